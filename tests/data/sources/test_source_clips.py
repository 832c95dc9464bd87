"""Folders of clips with captions."""

import pytest

from data_pipelines.samples import MediaRef, Message, Text
from data_pipelines.sources.clips import read_clips
from tests.data.sources.conftest import clip_bytes


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clips"
    path.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (path / name).write_bytes(clip_bytes())
    return path


def test_a_csv_table_names_clips_and_captions(folder, load):
    table = folder / "captions.csv"
    table.write_text('video,caption\na.mp4,"A wheel, turning"\nnone.mp4,x\n../secret.mp4,x\n', encoding="utf-8-sig")
    imported = load(read_clips(folder, table))
    record = imported.only()
    assert (record.key, record.task) == ("000000-a", "video")
    assert record.messages == (
        Message("user", (MediaRef("0.mp4", kind="video"), Text("Describe the video:"))),
        Message("assistant", (Text("A wheel, turning"),)),
    )
    facts = record.media["0.mp4"]
    assert (facts.width, facts.height, facts.frames, facts.fps, facts.duration_s) == (32, 16, 10, 10.0, 1.0)
    assert imported.media["000000-a", "0.mp4"] == (folder / "a.mp4").read_bytes()
    assert imported.reasons() == [("000001", "missing_media"), ("000002", "unsafe_path"), ("b.mp4", "no_annotation")]


def test_json_tables_captions_questions_and_chats(folder, write_json, load):
    rows = [
        {"file": "a.mp4", "captions": ["One.", "Two."], "question": "Where to?", "answer": "left"},
        {"video": "b.mp4", "conversations": [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "ok"}]},
        {"video": "b.mp4"},
    ]
    imported = load(read_clips(folder, write_json("rows.json", rows)))
    first, second = imported.records.values()
    assert [message.parts[-1].text for message in first.messages] == [
        "Describe the video:",
        "One.",
        "Generate another caption in English:",
        "Two.",
        "Where to? Answer:",
        "left",
    ]
    assert second.messages[0].parts == (MediaRef("0.mp4", kind="video"), Text("?"))
    assert imported.reasons() == [("000002-b", "no_annotation")]


def test_a_json_object_maps_files_to_captions(folder, write_json, load):
    imported = load(read_clips(folder, write_json("rows.json", {"b.mp4": "一只狗", "a.mp4": "a"})))
    assert list(imported.records) == ["000000-b", "000001-a"]
    assert imported.records["000000-b"].messages[0].parts[1] == Text("描述这个视频：")


def test_captions_in_text_files_beside_the_clips(folder, load):
    (folder / "a.txt").write_text("A caption.\n")
    imported = load(read_clips(folder, None))
    assert imported.only().messages[1].parts == (Text("A caption."),)
    assert imported.reasons() == [("b.mp4", "no_annotation")]


def test_a_broken_clip_is_left_out_and_a_gif_can_be_a_clip(folder, write_json, load):
    from PIL import Image

    frames = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(4)]
    frames[0].save(folder / "g.gif", save_all=True, append_images=frames[1:], duration=250)
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    (folder / "page.mp4").write_bytes(b"<html>404</html>")
    captions = dict.fromkeys(("a.mp4", "b.mp4", "g.gif", "cut.mp4", "page.mp4"), "x")
    imported = load(read_clips(folder, write_json("rows.json", captions)))
    assert imported.records["000002-g"].messages[0].parts[0] == MediaRef("0.gif", kind="video")
    facts = imported.records["000002-g"].media["0.gif"]
    assert (facts.kind, facts.width, facts.height, facts.frames) == ("video", 20, 10, 4)
    assert [key for key, _ in imported.reasons()] == ["000003-cut", "000004-page"]


def test_webvids_ids_name_files_beside_or_in_their_page(folder, load):
    (folder / "p1").mkdir()
    (folder / "p1" / "17.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "18.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "t.csv").write_text("videoid,name,page_dir\n17,One,p1\n18,Two,p1\n19,Three,p1\n../t,Four,p1\n")
    imported = load(read_clips(folder, folder / "t.csv"))
    assert list(imported.records) == ["000000-17", "000001-18"]
    assert imported.reasons()[:2] == [("000002", "missing_media"), ("000003", "unsafe_path")]


def test_long_captions_are_read_and_longer_ones_cost_their_row(folder, load, monkeypatch):
    table = folder / "t.TSV"
    table.write_text(f"video\tcaption\na.mp4\t{'long ' * 30_000}\nb.mp4\tx, y\n")
    imported = load(read_clips(folder, table))
    assert [len(record.messages[1].parts[0].text) for record in imported.records.values()] == [150_000, 4]
    monkeypatch.setattr("data_pipelines.sources.clips.MAX_RECORD_BYTES", 100_000)
    imported = load(read_clips(folder, table))
    assert list(imported.records) == ["000001-b"]
    assert imported.reasons() == [("t.TSV:2", "bad_csv"), ("a.mp4", "no_annotation")]


def test_json_lines_are_read_under_any_name_though_the_first_is_broken(folder, load):
    for name in ("rows.json", "rows.txt"):
        (folder / name).write_text('{"video": "a.mp4",\n{"video": "a.mp4", "caption": "x"}\n')
        imported = load(read_clips(folder, folder / name))
        assert imported.only().messages[1].parts == (Text("x"),)
        assert imported.reasons() == [(f"{name}:1", "bad_json"), ("b.mp4", "no_annotation")]
