"""Webdataset tars of others: img2dataset, GRIT, our own form; damage costs what it touches."""

import io
import json
import tarfile

import pytest

from data_pipelines.errors import RecordError
from data_pipelines.samples import MediaRef, Message, Region, Text
from data_pipelines.sources.webdataset_tars import read_grit, read_tar
from tests.data.sources.conftest import clip_bytes, picture_bytes


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_img2dataset_samples_are_captions_with_their_original_bytes(tmp_path, load):
    picture = picture_bytes()
    extra = json.dumps({"caption": "from json", "status": "success", "url": "http://x"}).encode()
    members = [
        ("b.jpg", picture),
        ("b.txt", b"from text"),
        ("a.jpg", picture),
        ("a.json", extra),
        ("c.txt", b"no picture"),
    ]
    imported = load(read_tar(write_tar(tmp_path / "t.tar", members), "t"))
    assert [r.messages[1].parts for r in imported.records.values()] == [(Text("from text"),), (Text("from json"),)]
    assert imported.media["t/000000-b", "0.jpg"] == picture
    assert imported.reasons() == [("t/000002-c", "no_media")]


def test_grit_boxes_are_fractions_of_the_picture(tmp_path, load):
    caption = "a dog near a red ball and a ball"
    data = {
        "caption": caption,
        "noun_chunks": [
            [2, 5, 0.25, 0.5, 0.5, 1.0, 0.9],
            [12, 21, 0.0, 0.0, 0.1, 0.1, 0.8],
            [2, 5, 0.5, 0, 1, 1, 0.9],
            [26, 32, 0, 0, 1, 1, 0.1],
        ],
        "ref_exps": [[0, 21, 0.25, 0.5, 0.5, 1.0, 0.9]],
    }
    members = [("0.jpg", picture_bytes()), ("0.json", json.dumps(data).encode())]
    record = load(read_tar(write_tar(tmp_path / "t.tar", members), "t", min_score=0.5)).only()
    assert record.messages[3].parts == (
        Text("a "),
        Region("0.jpg", "dog", ((10.0, 10.0, 20.0, 20.0), (20.0, 0.0, 40.0, 20.0))),
        Text(" near a"),
        Region("0.jpg", " red ball", ((0.0, 0.0, 4.0, 2.0),)),
        Text(" and a ball"),
    )
    assert record.messages[4].parts == (Region("0.jpg", "a dog near a red ball"),)
    assert record.messages[5].parts == (Region("0.jpg", None, ((10.0, 10.0, 20.0, 20.0),)),)


@pytest.mark.parametrize(
    "chunk", [[0, 99, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1, 1], [0, 1, "0", 0, 1, 1, 1], 5]
)
def test_broken_grit_spans_are_refused(chunk):
    with pytest.raises(RecordError):
        read_grit("k", {"noun_chunks": [chunk]}, "a dog", 0.0)


def test_our_own_shards_can_be_read_again(tmp_path, load):
    record = {
        "task": "referring",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "x.jpg"}, {"type": "region", "phrase": "it", "image": "x.jpg"}],
            },
            {"role": "assistant", "content": [{"type": "region", "boxes": [[1, 1, 2, 2]], "image": "x.jpg"}]},
        ],
    }
    members = [("k.json", json.dumps(record).encode()), ("k.x.jpg", picture_bytes())]
    read = load(read_tar(write_tar(tmp_path / "t.tar", members), "t")).only()
    assert read.task == "referring"
    assert read.messages[0].parts == (MediaRef("0.jpg", kind="image"), Region("0.jpg", "it"))


def test_texts_clips_and_tags_of_our_own_form(tmp_path, load):
    tagged = {
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}],
        "images": ["0.jpg"],
    }
    members = [
        ("a.json", json.dumps({"text": "Some words."}).encode()),
        ("b.json", json.dumps({"caption": "It turns."}).encode()),
        ("b.mp4", clip_bytes()),
        ("c.txt", b"It stops."),
        ("c.mp4", clip_bytes()),
        ("d.json", json.dumps(tagged).encode()),
        ("d.0.jpg", picture_bytes()),
    ]
    imported = load(read_tar(write_tar(tmp_path / "t.tar", members), "t"))
    assert imported.reasons() == []
    words, turns, stops, tags = imported.records.values()
    assert (words.task, words.messages) == ("text", (Message("assistant", (Text("Some words."),)),))
    for record, caption in ((turns, "It turns."), (stops, "It stops.")):
        assert record.messages[0].parts == (MediaRef("0.mp4", kind="video"), Text("Describe the video:"))
        assert record.messages[1].parts == (Text(caption),)
    assert tags.messages[0].parts == (MediaRef("0.jpg", kind="image"), Text("What?"))


def test_scattered_members_come_together_without_a_ledger_line(tmp_path, load):
    members = [("a.jpg", picture_bytes()), ("b.jpg", picture_bytes()), ("a.txt", b"one"), ("b.txt", b"two")]
    imported = load(read_tar(write_tar(tmp_path / "t.tar", members), "t"))
    assert [r.messages[1].parts for r in imported.records.values()] == [(Text("one"),), (Text("two"),)]
    assert imported.reasons() == []


def test_a_cut_tar_keeps_what_lies_before_the_cut(tmp_path, load):
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", picture_bytes()), ("txt", b"x"))]
    path = write_tar(tmp_path / "w.tar", members)
    with tarfile.open(path) as tar:
        offsets = [info.offset_data for info in tar]
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[: offsets[2] + 100])
    imported = load(read_tar(tmp_path / "cut.tar", "t"))
    assert list(imported.records) == ["t/000000-0"]
    assert [reason for _, reason in imported.reasons()] == ["cut_shard"]
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[: offsets[3] - 512])
    imported = load(read_tar(tmp_path / "cut.tar", "t"))
    assert list(imported.records) == ["t/000000-0"]
    assert [reason for _, reason in imported.reasons()] == ["no_end_marker", "no_record"]
    assert load(read_tar(tmp_path / "none.tar", "t")).reasons() == [("none.tar", "unreadable_shard")]
