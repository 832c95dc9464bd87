"""OCR pages: quads of every read form, clockwise, and what is left out."""

from data_pipelines.samples import Region, Text
from data_pipelines.sources.ocr import read_folder, read_manifest
from data_pipelines.sources.quads import clockwise

QUAD = (1.0, 1.0, 9.0, 1.0, 9.0, 4.0, 1.0, 4.0)


def test_quads_come_out_clockwise_from_their_first_corner():
    assert clockwise(QUAD) == QUAD
    rotated = (9.0, 4.0, 1.0, 4.0, 1.0, 1.0, 9.0, 1.0)  # upside-down text begins at the bottom right
    assert clockwise(rotated) == rotated
    bottom_left_first = (1.0, 4.0, 9.0, 4.0, 9.0, 1.0, 1.0, 1.0)
    assert clockwise(bottom_left_first) == QUAD
    crossing = (1.0, 1.0, 9.0, 4.0, 9.0, 1.0, 1.0, 4.0)
    assert clockwise(crossing) == QUAD


def test_a_manifest_gives_lines_with_quads(tmp_path, make_picture, write_json, load):
    make_picture("a.jpg")
    pages = [
        {
            "image": "a.jpg",
            "width": 40,
            "height": 20,
            "lines": [{"text": "AB", "quad": list(QUAD)}, {"text": " ", "box": [1, 1, 5, 5]}],
        },
        {"file_name": "a.jpg", "annotations": [{"text": "C", "box": [1, 4, 9, 4, 9, 1, 1, 1], "label": 3}]},
        {"image": "a.jpg", "lines": [{"text": None, "quad": list(QUAD)}, {"text": "###", "quad": list(QUAD)}]},
        {"image": "a.jpg", "text": "GRAND"},
        {"image": "a.jpg", "lines": [{"text": "x", "quad": [1, 2, 3]}]},
        {"image": "a.jpg"},
    ]
    imported = load(read_manifest(write_json("m.jsonl", pages), tmp_path, "m"))
    first, second, third, fourth = imported.records.values()
    assert first.task == "ocr"
    assert first.messages[0].parts[1] == Text("OCR with grounding:")
    assert first.messages[1].parts == (Region("0.jpg", "AB", quads=(QUAD,)),)
    assert second.messages[1].parts == (Region("0.jpg", "C", quads=(QUAD,)),)
    assert third.messages[0].parts[1] == Text("Find the text in the picture:")
    assert third.messages[1].parts == (Region("0.jpg", None, quads=(QUAD,)),)
    assert [message.parts[-1] for message in fourth.messages] == [Text("OCR:"), Text("GRAND")]
    assert imported.reasons() == [("m/000004", "bad_box"), ("m/000005", "no_annotation"), ("m/000000", "empty_text")]


def test_folders_of_icdar_and_sroie(tmp_path, make_picture, load):
    make_picture("pages/a.jpg")
    make_picture("pages/b 2.jpg")
    make_picture("pages/c.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/gt_a.txt").write_bytes(b"\xef\xbb\xbf1,1,9,1,9,4,1,4,Total, 5\r\n1,1,9,1,9,4,1,4,###\r\n")
    (tmp_path / "labels/b 2.csv").write_text('1,1,9,1,9,4,1,4,"say ""hi"", you"\n')
    (tmp_path / "labels/b 2.key.json").write_text('{"company": "X Ltd", "total": "5", "date": ""}')
    (tmp_path / "labels/c.txt").write_text("1,1,9,1,9,4,1,no\n")
    imported = load(read_folder(tmp_path / "pages", tmp_path / "labels", "p"))
    assert imported.records["p/a"].messages[1].parts == (Region("0.jpg", "Total, 5", quads=(QUAD,)),)
    b = imported.records["p/b_2"]
    assert b.messages[1].parts == (Region("0.jpg", 'say "hi", you', quads=(QUAD,)),)
    assert b.messages[2].parts == (Text("Extract company, total as JSON:"),)
    assert b.messages[3].parts == (Text('{"company": "X Ltd", "total": "5"}'),)
    assert imported.reasons() == [("p/c", "bad_box")]


def test_a_page_without_labels_is_a_ledger_line(tmp_path, make_picture, load):
    make_picture("pages/a.jpg")
    assert load(read_folder(tmp_path / "pages", tmp_path / "pages", "p")).reasons() == [("p/a", "no_annotation")]


def test_sroies_key_values_are_read_as_they_are_published(tmp_path, make_picture, load):
    # Task 3's folder: NAME.jpg with NAME.txt that holds JSON; others ship img/, box/ and entities/ or key/.
    make_picture("img/a.jpg")
    make_picture("task3/a.jpg")
    for folder, name in (("task3", "a.txt"), ("entities", "a.txt"), ("key", "a.json")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text('{\n    "company": "X Ltd",\n    "total": "5"\n}\n')
    (tmp_path / "box").mkdir()
    (tmp_path / "box/a.txt").write_text("1,1,9,1,9,4,1,4,TOTAL\n")
    asked = [(Text("Extract company, total as JSON:"),), (Text('{"company": "X Ltd", "total": "5"}'),)]
    record = load(read_folder(tmp_path / "task3", tmp_path / "task3", "p")).only()
    assert [message.parts[-1:] for message in record.messages] == asked
    for folder in ("entities", "key"):
        record = load(read_folder(tmp_path / "img", tmp_path / "box", "p", tmp_path / folder)).only()
        assert record.messages[1].parts == (Region("0.jpg", "TOTAL", quads=(QUAD,)),)
        assert [message.parts[-1:] for message in record.messages[2:]] == asked
