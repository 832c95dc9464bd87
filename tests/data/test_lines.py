"""JSON lines beside a media folder, trained on as they are: what is read, what is refused, how alike to a tar it is."""

import io
import json
import os
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.config import SourceConfig
from data_pipelines.errors import ShardError
from data_pipelines.index.build import Counting, load_index
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.samples import Media, Region, Text
from data_pipelines.shards.lines import scan_lines
from data_pipelines.shards.storage import LocalFile, expand_shards
from data_pipelines.sources.importer import run_import
from data_pipelines.sources.records import read_records
from data_pipelines.sources.shard_groups import ImportSettings


def picture(path, width=60, height=40, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if path.suffix == ".png" else "JPEG", **options)
    path.write_bytes(file.getvalue())
    return path


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def llava(number, name, answer):
    turns = [{"from": "human", "value": "<image>\nwhile two birds"}, {"from": "gpt", "value": answer}]
    return {"id": f"{number}", "image": name, "conversations": turns}


@pytest.fixture
def folder(tmp_path):
    """12 lines of all forms in train.jsonl: chats of one and two pictures, captions with boxes, texts."""
    lines = []
    for number in range(12):
        name = f"images/{number:02d}.png"
        picture(tmp_path / name, 40 + 9 * number, 90 - 5 * number, number)
        lines.append(llava(number, name, f"a red dog {number}"))
    lines[3] = {"image": "images/03.png", "caption": "a red dog", "boxes": [{"phrase": "dog", "box": [1, 2, 30, 40]}]}
    lines[5] = {"text": "one small cat sleeps"}
    two = [{"type": "image", "image": f"images/0{n}.png"} for n in (6, 7)] + [{"type": "text", "text": "two birds"}]
    lines[6] = {"messages": [{"role": "user", "content": two}, {"role": "assistant", "content": "a green hill"}]}
    write_lines(tmp_path / "train.jsonl", lines)
    return tmp_path


def config(tiny, *shards, **changes):
    return replace(tiny.config(max_tokens=160), sources={"s": SourceConfig(tuple(map(str, shards)))}, **changes)


def take(tiny, settings, steps=6, world=1, rank=0, state=None):
    loader = PackLoader(settings, tiny.tokenizer, 2, rank, world, 0)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    steps = list(islice(loader, steps))
    loader.close()
    return steps, loader.state_dict()


def documents(steps):
    """(key's last part, ids, bytes of pictures) of every pack's documents, by pack."""
    return [
        (
            [key.rpartition("/")[2] for key in batch.keys],
            batch.input_ids.tolist(),
            batch.image_patches.numpy().tobytes(),
        )
        for step in steps
        for batch in step
    ]


def test_lines_end_at_line_feeds_only_and_keep_their_places(tmp_path):
    rows = [b'{"a": 1}\r\n', b"\n", '{"b": "x\u2028y\u0085z"}\n'.encode(), b"  \t\r\n", b"broken", b"\n", b'{"c": 3}']
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(rows))
    found = scan_lines(LocalFile(str(path)))
    members = [(sample.key, sample.members["json"]) for sample in found.samples]
    # lines 0, 2, 4 and 5: 10 bytes with their \r\n, then 1, then 20 of which one is the line feed
    assert [key for key, _ in members] == ["x/000000", "x/000002", "x/000004", "x/000005"]
    assert [(member.offset, member.size) for _, member in members[:2]] == [(0, 9), (11, len(rows[2]) - 1)]
    assert LocalFile(str(path)).read(members[3][1].offset, members[3][1].size) == b'{"c": 3}'
    assert found.problems == []


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000])
def test_lines_across_blocks_are_whole(tmp_path, monkeypatch, length):
    monkeypatch.setattr("data_pipelines.shards.lines._READ_BYTES", length)
    rows = [b'{"text": "' + b"x" * size + b'"}' for size in (0, 5, 40, 1)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n\n".join(rows) + b"\n")
    file = LocalFile(str(path))
    members = [sample.members["json"] for sample in scan_lines(file).samples]
    assert [file.read(member.offset, member.size) for member in members] == rows
    assert [sample.key for sample in scan_lines(file).samples] == [f"x/00000{number}" for number in (0, 2, 4, 6)]


def test_all_forms_become_records_with_the_facts_of_their_media(folder, tiny):
    source = SourceIndex("s", [str(folder / "train.jsonl")], Counting(tiny.tokenizer, "plain"))
    records = {key: (record, read) for key, record, _, read in source.records()}
    assert source.table(0).problems == ()
    assert list(records) == [f"train/{number:06d}" for number in range(12)]
    record, read = records["train/000006"]
    assert record.media == {"0.png": Media("0.png", "image", 94, 60), "1.png": Media("1.png", "image", 103, 55)}
    assert read("1.png") == (folder / "images" / "07.png").read_bytes()
    record, _ = records["train/000003"]
    assert record.task == "grounded_caption"
    assert record.messages[3].parts[1] == Region("0.png", "dog", ((1, 2, 30, 40),))
    assert records["train/000005"][0].task == "text"
    assert records["train/000000"][0].messages[0].parts[1] == Text("while two birds")


def test_it_trains_as_its_import_into_shards_does(folder, tiny):
    entries = read_records(folder / "train.jsonl", folder, "train")
    run_import(entries, ImportSettings(folder / "out", "train", "records", {}), lambda _: None)
    direct, _ = take(tiny, config(tiny, folder / "train.jsonl"))
    through, _ = take(tiny, config(tiny, folder / "out" / "*.tar"))
    assert documents(direct) == documents(through)
    assert all(batch.events == () for step in direct for batch in step)


def test_it_resumes_bitwise_under_another_world(folder, tiny):
    settings = config(tiny, folder / "train.jsonl")
    whole, _ = take(tiny, settings, 7)
    first, state = take(tiny, settings, 3)
    ranks = [take(tiny, settings, 4, 2, rank, state)[0] for rank in range(2)]
    rest = [[ranks[pack % 2][step][0] for pack in range(2)] for step in range(4)]
    assert documents(whole) == documents(first) + documents(rest)


def test_workers_read_lines_as_the_process_itself_does(folder, tiny):
    settings = config(tiny, folder / "train.jsonl")
    there = replace(settings, loader=replace(settings.loader, num_workers=2))
    assert documents(take(tiny, there, 3)[0]) == documents(take(tiny, settings, 3)[0])


def test_media_may_lie_below_another_folder(folder, tiny, tmp_path):
    lines = (folder / "train.jsonl").rename(tmp_path / "elsewhere.jsonl")
    away = write_lines(tmp_path / "lists" / "train.jsonl", [llava(0, "00.png", "a red dog")])
    moved = tmp_path / "moved"
    picture(moved / "00.png", 70, 50)
    shards = expand_shards("s", [f"{away}::{folder}/images", f"{tmp_path}/lists/*.jsonl::{moved}", str(lines)])
    assert shards == sorted([f"{away}::{folder}/images", f"{away}::{moved}", str(lines)])
    sizes = [load_index(shard).media(0)[0][0].width for shard in (f"{away}::{folder}/images", f"{away}::{moved}")]
    assert sizes == [40, 70]
    settings = config(tiny, f"{away}::{moved}", lines)
    assert all(batch.events == () for step in take(tiny, settings, 3)[0] for batch in step)


REFUSED = {
    "traversal": ("../secret.png", "unsafe_path"),
    "inside and out again": ("images/../../secret.png", "unsafe_path"),
    "link that leads out": ("images/link.png", "unsafe_path"),
    "folder link": ("out/secret.png", "unsafe_path"),
    "absolute": ("/etc/passwd", "unsafe_path"),
    "url": ("http://localhost/x.png", "unsafe_path"),
    "home": ("~/x.png", "unsafe_path"),
    "nul": ("images/a\0.png", "unsafe_path"),
    "missing": ("images/none.png", "missing_media"),
    "folder": ("images", "missing_media"),
    "pipe": ("images/pipe.png", "missing_media"),
    "empty": ("images/empty.png", "empty_media"),
    "the lines themselves": ("train.jsonl", "not_an_image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_lead_nowhere_but_below_the_folder(tmp_path, tiny, name):
    root = tmp_path / "data"
    picture(root / "images" / "good.png")
    picture(tmp_path / "secret.png")
    (root / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "out").symlink_to(tmp_path)
    (root / "images" / "empty.png").write_bytes(b"")
    os.mkfifo(root / "images" / "pipe.png")
    named, reason = REFUSED[name]
    lines = [llava(0, "images/good.png", "a dog"), llava(1, named, "a dog"), llava(2, "images/good.png", "a cat")]
    index = load_index(str(write_lines(root / "train.jsonl", lines)))
    assert [index.key(row) for row in range(index.num_samples)] == ["train/000000", "train/000002"]
    assert [(key, why) for key, why, _ in index.problems] == [("train/000001", reason)]


def test_a_link_inside_the_folder_is_followed(tmp_path):
    picture(tmp_path / "store" / "a.png")
    (tmp_path / "images").symlink_to(tmp_path / "store")
    index = load_index(str(write_lines(tmp_path / "train.jsonl", [llava(0, "images/a.png", "a dog")])))
    assert index.num_samples == 1


BROKEN = [
    (b'{"conversations": [', "bad_json"),
    (b"\xff\xfe", "bad_json"),
    (b"null", "bad_field"),
    (b'["a"]', "bad_field"),
    (b'{"image": "images/00.png"}', "no_record"),
    (b'{"image": 7, "caption": "x"}', "missing_media"),
    (b'{"image": "images/00.png", "caption": "x", "boxes": [{"phrase": "d", "box": [1, 2, 3]}]}', "bad_box"),
    (b'{"image": "images/00.png", "caption": "x", "boxes": [{"phrase": "d", "box": [1, 2, 999, 9]}]}', "bad_box"),
    (b'{"image": "images/00.png", "caption": "x", "boxes": [[1, 2, 9, 9]], "width": 8, "height": 8}', "size_mismatch"),
    (b'{"image": "images/00.png", "conversations": [{"from": "robot", "value": "x"}]}', "bad_turns"),
    (b'{"images": ["images/00.png"], "messages": [{"role": "user", "content": "<image><image>"},'
     b' {"role": "assistant", "content": "x"}]}', "tag_mismatch"),
]  # fmt: skip


def test_a_broken_line_is_a_ledger_line_and_nothing_else_is_lost(folder, tiny):
    path = folder / "train.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        b"".join(line for i, row in enumerate(good) for line in [row, *(b + b"\n" for b, _ in BROKEN[i : i + 1])])
    )
    settings = config(tiny, path)
    settings = replace(settings, sources={"s": SourceConfig((str(path),), max_error_rate=0.6)})
    steps, _ = take(tiny, settings, 12)
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.add([batch for step in steps for batch in step])
    rows = [json.loads(row) for row in (folder / "ledger.jsonl").read_text().splitlines()]
    # a broken line stands behind each of the first 11 good ones: lines 1, 3, 5, ... 21
    expected = {(f"train/{2 * i + 1:06d}", reason) for i, (_, reason) in enumerate(BROKEN)}
    assert {(row["key"], row["reason"]) for row in rows} == expected
    assert {key for step in steps for batch in step for key in batch.keys} == {
        f"train/{number:06d}" for number in [*range(0, 22, 2), 22]
    }


def test_a_line_in_which_nothing_is_said_names_what_it_has_and_what_it_needs(tmp_path):
    lines = [{"id": 3, "image": "a.png"}, {"id": 3}, {}, {"caption": "a dog"}]
    index = load_index(str(write_lines(tmp_path / "train.jsonl", lines)))
    first, second, third, fourth = (message for _, _, message in index.problems)
    assert first.startswith("the record has only 'id', 'image': it needs 'caption', 'text' or 'messages'")
    assert second.startswith("the record has only 'id': it needs")
    assert third.startswith("the record is empty: it needs")
    assert fourth == "a caption of nothing: name its picture or clip as 'image' or 'video'"


def test_a_file_edited_after_it_was_indexed_is_noticed(folder, tiny):
    path = folder / "train.jsonl"
    source = SourceIndex("s", [str(path)], Counting(tiny.tokenizer, "plain"))
    source.table(0)
    with open(path, "r+b") as file:  # the same size
        data = file.read()
        file.seek(0)
        file.write(data.replace(b"a red dog 0", b"a red cat 0"))
    with pytest.raises(ShardError, match="shard_changed"):
        source.read(0, 0)
    assert source.read(0, 1)[0].key == "train/000001"


def test_a_picture_replaced_by_one_of_another_size_leaves_its_pack(folder, tiny):
    settings = config(tiny, folder / "train.jsonl")
    take(tiny, settings, 1)
    picture(folder / "images" / "02.png", 200, 300)
    steps, _ = take(tiny, settings, 8)
    events = [event for step in steps for batch in step for event in batch.events]
    assert {(event.key, event.reason) for event in events} == {("train/000002", "size_mismatch")}


def test_boxes_of_chats_on_the_grid_become_pixels(tmp_path, tiny):
    picture(tmp_path / "a.png", 200, 100)
    words = "<ref>the dog</ref><box>(100,200),(499,999)</box>"
    path = write_lines(tmp_path / "train.jsonl", [llava(0, "a.png", words)])
    source = SourceIndex("s", [str(path)], Counting(tiny.tokenizer, "plain"))
    record, _ = source.read(0, 0)
    # cells 100 and 499 of 200 pixels: 20.1 and 99.9; cells 200 and 999 of 100 pixels: 20.05 and 99.95
    (region,) = record.messages[1].parts
    assert region.phrase == "the dog"
    assert region.boxes == (pytest.approx((20.1, 20.05, 99.9, 99.95)),)


def test_boxes_on_a_turned_picture_need_its_displayed_size(tmp_path, tiny):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", 60, 40, exif=exif)  # shown as 40 x 60
    line = {"image": "a.jpg", "caption": "a dog", "boxes": [{"phrase": "dog", "box": [1, 2, 30, 50]}]}
    lines = [line, {**line, "width": 40, "height": 60}, {**line, "width": 60, "height": 40}, {**line, "boxes": []}]
    index = load_index(str(write_lines(tmp_path / "train.jsonl", lines)))
    assert [index.key(row)[-1] for row in range(index.num_samples)] == ["1", "3"]
    assert [(key[-1], reason) for key, reason, _ in index.problems] == [("0", "turned_picture"), ("2", "size_mismatch")]


def test_clips_are_read_beside_their_lines(tmp_path, tiny):
    from sources.conftest import clip_bytes

    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(clip_bytes(frames=8, width=64, height=48))
    turns = [{"from": "human", "value": "<video>\na dog"}, {"from": "gpt", "value": "two birds"}]
    path = write_lines(tmp_path / "train.jsonl", [{"video": "clips/a.mp4", "conversations": turns}])
    settings = config(tiny, path)
    media = replace(settings.media, video_min_pixels=3136, video_max_pixels=3136)
    (batch, _), *_ = take(tiny, replace(settings, media=media), 1)[0]
    assert batch.events == ()
    # 0.8 s at 2 fps: the least number of frames, 4, of 56 x 56 pixels: 2 pairs of 4 x 4 patches a document
    assert batch.video_patches.shape == (2 * 16 * len(batch.keys), 1176)
    assert torch.equal(batch.grid_thw[0], torch.tensor([2, 4, 4], dtype=torch.int32))
