"""Manifests of mixed items: every item becomes a sample or a ledger line that carries its id."""

import json
from collections import Counter

import pytest

from data_pipelines.cli import main
from data_pipelines.samples import MediaRef, Region, Text
from data_pipelines.sources.manifest import read_manifest
from tests.data.sources.conftest import clip_bytes, read_back


@pytest.fixture
def manifest(tmp_path, make_picture, write_json, load):
    make_picture("p/a.jpg")
    make_picture("p/b.jpg", seed=2)
    (tmp_path / "v.mp4").write_bytes(clip_bytes())
    (tmp_path / "t.txt").write_text("Some text.")

    def run(*items):
        listed = [{"id": f"x/{i}", **item} for i, item in enumerate(items)]
        return load(read_manifest(write_json("manifest.json", {"items": listed}), tmp_path))

    return run


def test_kinds_of_annotation_may_stand_together(manifest):
    told = {
        "captions": ["A dog."],
        "boxes": [{"label": "dog", "bbox_xyxy": [1, 2, 3, 4], "iscrowd": 0}],
        "vqa": [{"question": "What?", "answer": "dog"}, {"question": "?", "answer": ""}],
        "label": "dog",
    }
    imported = manifest({"kind": "any", "file": "p/a.jpg", "annotations": told, "width": 40, "height": 20})
    record = imported.records["x/0"]
    answers = [message.parts for message in record.messages if message.role == "assistant"]
    box = ((1.0, 2.0, 3.0, 4.0),)
    assert answers == [
        (Text("A dog."),),
        (Region("0.jpg", "dog", box),),
        (Region("0.jpg", None, box),),
        (Text("dog"),),
        (Text("dog"),),
    ]
    assert imported.reasons() == [("x/0: vqa[1]", "empty_text")]


def test_chats_clips_documents_and_files(manifest, write_json):
    write_json("c.json", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    clip_turns = [[{"role": "user", "content": "<video>1"}, {"role": "assistant", "content": "x"}]] * 2
    imported = manifest(
        {"kind": "chat_image", "file": ["p/a.jpg"], "annotations": {"messages": turns}},
        {"kind": "video", "file": "v.mp4", "annotations": {"captions": ["C."], "messages_list": clip_turns}},
        {"kind": "video", "file": "v.mp4", "annotations": {"messages_list": clip_turns}},
        {
            "kind": "interleaved",
            "file": ["p/a.jpg"],
            "annotations": {"segments": [{"type": "text", "text": "One "}, {"type": "image", "image": "p/b.jpg"}]},
        },
        {
            "kind": "preference_image",
            "file": "p/a.jpg",
            "annotations": {
                "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}]}],
                "chosen": [{"role": "assistant", "content": "good"}],
                "rejected": [{"role": "assistant", "content": "bad"}],
            },
        },
        {"kind": "text_plain", "file": "t.txt"},
        {"kind": "text_chat", "file": "c.json"},
        {"kind": "image", "file": "p/none.jpg", "annotations": {"captions": ["x"]}},
        {"kind": "image", "file": "p/a.jpg", "annotations": {}},
    )
    shown = {key: [m.parts for m in record.messages] for key, record in imported.records.items()}
    clip, picture = MediaRef("0.mp4", kind="video"), MediaRef("0.jpg", kind="image")
    assert shown["x/0"] == [(picture, Text("?")), (Text("x"),)]
    assert [len(parts) for parts in shown["x/1"]] == [2, 1, 1, 1, 1, 1]
    assert shown["x/2"] == [(clip, Text("1")), (Text("x"),), (Text("1"),), (Text("x"),)]
    assert shown["x/3"] == [(Text("One "), picture)]
    assert shown["x/4"] == [(picture,), (Text("good"),)]
    assert shown["x/5/000000-00"] == [(Text("Some text."),)]
    assert shown["x/6/000000"] == [(Text("a"),), (Text("b"),)]
    assert sorted(imported.reasons()) == [
        ("x/6/000001", "bad_text"),
        ("x/7", "missing_media"),
        ("x/8", "no_annotation"),
    ]
    tasks = [imported.records[f"x/{i}"].task for i in range(5)]
    assert tasks == ["chat", "video", "video", "interleaved", "chat"]


def test_the_command_writes_shards_and_says_what_it_did(tmp_path, make_picture, write_json, capsys):
    make_picture("a.jpg")
    item = {"id": "x/0", "kind": "image", "file": "a.jpg", "annotations": {"captions": ["A dog."]}}
    path = write_json("m.json", {"items": [item, {"id": "x/1", "file": "gone.jpg"}]})
    arguments = ["import", "manifest", str(path), "--out", str(tmp_path / "out"), "--name", "mixed"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "missing_media 1" in printed
    assert "caption 1" in printed
    imported = read_back(tmp_path / "out")
    assert list(imported.records) == ["x/0"]
    assert imported.manifest["settings"]["manifest"] == str(path)
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_missing_source_and_a_useless_one_end_with_an_error(tmp_path, write_json, capsys):
    assert main(["import", "manifest", str(tmp_path / "none.json"), "--out", str(tmp_path / "o")]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
    path = write_json("m.json", {"items": [{"id": "x", "file": "gone.jpg"}]})
    assert main(["import", "manifest", str(path), "--out", str(tmp_path / "o")]) == 1
    assert "no usable sample" in capsys.readouterr().err


def test_help_names_every_source(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["import", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for source in ("coco", "chat", "ocr", "clips", "text", "vqa", "classes", "webdataset", "records", "manifest"):
        assert f"  {source} " in printed


@pytest.mark.real_data
def test_no_real_item_is_lost_without_a_ledger_line(shared_data, tmp_path):
    path = shared_data / "real" / "manifest.json"
    assert main(["import", "manifest", str(path), "--out", str(tmp_path / "out")]) == 0
    imported = read_back(tmp_path / "out")
    items = json.loads(path.read_text())["items"]
    written = Counter(key.split("/")[0] + "/" + key.split("/")[1] for key in imported.records)
    told = {line["key"].split(":")[0] for line in imported.ledger}
    for item in items:
        assert written[item["id"]] or item["id"] in told, item["id"]
    samples = sum(item["annotations"].get("samples", 0) for item in items if item["kind"] == "text_chat")
    assert sum(written[item["id"]] for item in items if item["kind"] == "text_chat") == samples == 2459
