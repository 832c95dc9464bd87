"""Plain text, class folders, records of our own, and keys."""

import pytest

from data_pipelines.samples import MediaRef, Message, Region, Text
from data_pipelines.sources.classes import read_classes
from data_pipelines.sources.keys import key_of
from data_pipelines.sources.records import read_records
from data_pipelines.sources.text import read_text, split_text


def texts(imported):
    return [record.messages[0].parts[0].text for record in imported.records.values()]


@pytest.mark.parametrize("limit", [7, 30, 1000])
def test_pieces_joined_give_the_text(limit):
    document = "A title\n\nFirst sentence. Second one! 第三句。第四句。\nlast words without end " * 3
    pieces = split_text(document, limit)
    assert max(map(len, pieces)) <= limit
    assert "".join(pieces) == document


def test_texts_are_cut_at_paragraphs_before_sentences():
    assert split_text("aaaa. bbbb\n\ncc. dd", 14) == ["aaaa. bbbb\n\n", "cc. dd"]
    assert split_text("aaaa. bbbb. cc. dd", 14) == ["aaaa. bbbb. ", "cc. dd"]
    assert split_text("x" * 10, 4) == ["xxxx", "xxxx", "xx"]


def test_text_files_and_lines(tmp_path, write_json, load):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert texts(load(read_text(tmp_path / "a.txt", "a"))) == ["One.\n\nTwo.\n"]
    assert texts(load(read_text(tmp_path / "a.txt", "a", unit="line"))) == ["One.", "Two."]
    imported = load(
        read_text(write_json("b.jsonl", [{"text": "x"}, {"text": " "}, {"content": "y"}, {"text": "z"}]), "b")
    )
    assert texts(imported) == ["x", "z"]
    assert imported.reasons() == [("b/000001", "empty_text"), ("b/000002", "bad_text")]
    (tmp_path / "c.txt").write_bytes("Grüße".encode("latin-1"))
    assert load(read_text(tmp_path / "c.txt", "c")).reasons() == [("c.txt", "bad_text")]


def test_line_ends_are_line_feeds(tmp_path, load):
    (tmp_path / "a.txt").write_bytes(b"One.\r\n\r\nTwo.\rThree.\n")
    assert texts(load(read_text(tmp_path / "a.txt", "a"))) == ["One.\n\nTwo.\nThree.\n"]
    assert texts(load(read_text(tmp_path / "a.txt", "a", unit="line"))) == ["One.", "Two.", "Three."]


def test_class_folders_ask_for_the_class(tmp_path, make_picture, write_json, load):
    make_picture("set/n01/a.jpg")
    make_picture("set/sea_lion/b.jpg")
    imported = load(read_classes(tmp_path / "set", write_json("names.json", {"n01": "goldfish"})))
    assert [r.messages[1].parts[0].text for r in imported.records.values()] == ["goldfish", "sea lion"]
    assert {record.task for record in imported.records.values()} == {"classification"}


def test_records_of_our_own_form(tmp_path, make_picture, write_json, load):
    make_picture("media/a.jpg", orientation=6)
    lines = [
        {"image": "a.jpg", "caption": "a dog", "boxes": [{"label": "dog", "bbox": [4, 2, 10, 8]}], "task": "mine"},
        {"text": "words"},
        {
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}],
            "images": ["a.jpg"],
        },
        {"image": "a.jpg", "caption": "x", "boxes": [{"phrase": "dog", "box": [4, 2, 10, 80]}]},
        {"image": "a.jpg", "width": 7, "height": 7, "caption": "x", "boxes": [{"phrase": "dog", "box": [1, 1, 2, 2]}]},
    ]
    imported = load(read_records(write_json("r.jsonl", lines), tmp_path / "media", "r"))
    first, second, third = imported.records.values()
    assert (first.task, second.task, third.task) == ("mine", "text", "chat")
    # Orientation 6 turns the box (4, 2, 10, 8) of the 40 x 20 file to (12, 4, 18, 10) on the 20 x 40 picture.
    assert first.messages[3].parts == (Text("a "), Region("0.jpg", "dog", ((12.0, 4.0, 18.0, 10.0),)))
    assert second.messages == (Message("assistant", (Text("words"),)),)
    assert third.messages[0].parts == (MediaRef("0.jpg", kind="image"), Text("?"))
    assert imported.reasons() == [("r/000003", "bad_box"), ("r/000004", "size_mismatch")]


def test_keys_hold_only_what_a_tar_can():
    assert key_of("receipt 1.v2") == "receipt_1_v2"
    assert key_of("../中文") == "item"
    assert len(key_of("x" * 500)) == 80
