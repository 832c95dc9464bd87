"""The side index: what it keeps, when it is stale, what a bad sample costs."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import DataConfig, MediaConfig, PlanConfig, SourceConfig
from data_pipelines.errors import MediaError, ShardError
from data_pipelines.index import build, places
from data_pipelines.index.build import Counting, build_missing, load_index
from data_pipelines.index.source import SourceIndex
from data_pipelines.index.table import ColumnError, Columns, text_column, write_columns
from data_pipelines.ledger import Ledger
from data_pipelines.loader import new_planner, open_sources
from data_pipelines.pack.read import PackReader
from data_pipelines.samples import Media, MediaRef
from data_pipelines.shards.storage import expand_shards
from data_pipelines.shards.writer import ShardWriter


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def counting(tiny):
    return Counting(tiny.tokenizer, "plain")


@pytest.fixture
def source(tmp_path, counting):
    """Two pictures in one chat, one text; one of three records is broken."""
    user = [{"type": "image", "image": "1.png"}, {"type": "image", "image": "0.png", "max_pixels": 9000}]
    user.append({"type": "image", "image": "1.png"})
    answer = {"role": "assistant", "content": "a dog"}
    with ShardWriter(tmp_path, "s") as writer:
        chat = {"messages": [{"role": "user", "content": user}, answer], "task": "compare"}
        writer.write(
            "a/1",
            {**chat, "media": {"0.png": {"width": 60, "height": 40}}},
            {"0.png": png(60, 40), "1.png": png(50, 90)},
        )
        writer.write("a/2", {"messages": "none"}, {})
        writer.write("a/3", {"text": "a dog"}, {})
    return SourceIndex("s", expand_shards("s", [f"{tmp_path}/s-*.tar"]), counting)


def test_columns_round_trip_through_a_mapped_file(tmp_path):
    arrays = {
        "x": np.arange(5, dtype=np.int64),
        **text_column("name", ["", "ä", "b" * 300]),
        "none": np.zeros(0, np.uint8),
    }
    write_columns(tmp_path / "c", arrays, {"number": 1})
    columns = Columns(tmp_path / "c")
    assert columns.meta == {"number": 1}
    assert columns.arrays["x"].tolist() == [0, 1, 2, 3, 4]
    assert [columns.text("name", row) for row in range(3)] == ["", "ä", "b" * 300]
    assert not columns.arrays["x"].flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_cut_or_foreign_side_file_is_refused(tmp_path):
    write_columns(tmp_path / "c", {"x": np.arange(500)}, {})
    data = (tmp_path / "c").read_bytes()
    for content in (b"", data[:5], data[:60], data[:-1], b"\xff" * 100, b"<html>" * 50):
        (tmp_path / "d").write_bytes(content)
        with pytest.raises(ColumnError):
            Columns(tmp_path / "d")


def test_a_shard_that_two_patterns_spell_otherwise_is_read_once(tmp_path):
    """It was read twice an epoch."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for name in ("x.tar", "y.tar"):
        (tmp_path / "a" / name).write_bytes(b"")
    patterns = [f"{tmp_path}/a/*.tar", f"{tmp_path}/a/../a/x.tar", f"{tmp_path}/link/y.tar"]
    assert [Path(shard).name for shard in expand_shards("s", patterns)] == ["x.tar", "y.tar"]


def test_media_stand_in_document_order_with_their_limits(source):
    index = source.table(0).index
    assert [index.key(row) for row in range(index.num_samples)] == ["a/1", "a/3"]
    first, second, third = index.media(0)
    assert first == third == (Media("1.png", "image", 50, 90), MediaRef("1.png", kind="image"))
    assert second == (Media("0.png", "image", 60, 40), MediaRef("0.png", max_pixels=9000, kind="image"))
    assert index.media(1) == ()
    assert [index.task_name(int(number)) for number in index.arrays["task"]] == ["compare", "text"]


def test_a_bad_record_is_listed_and_costs_nothing_else(source):
    assert [(key, reason) for key, reason, _ in source.table(0).problems] == [("a/2", "bad_field")]
    assert source.table(0).index.num_samples == 2


def test_counts_of_problems_are_exact_where_their_list_is_cut(tmp_path, tiny, counting, monkeypatch):
    monkeypatch.setattr(build, "MAX_LISTED_PROBLEMS", 3)
    with ShardWriter(tmp_path, "s") as writer:
        for number in range(6):
            writer.write(f"a{number}", {"caption": "no picture"}, {})
        for number in range(4):
            writer.write(f"b{number}", {"messages": "none"}, {})
        writer.write("c", {"text": "a dog"}, {})
    source = SourceIndex("s", expand_shards("s", [f"{tmp_path}/s-*.tar"]), counting)
    table = source.table(0)
    assert [key for key, *_ in table.problems] == ["a0", "a1", "a2"]
    assert table.unlisted == {"no_media": 3, "bad_field": 4}
    config = DataConfig({"s": SourceConfig((f"{tmp_path}/s-*.tar",))}, plan=PlanConfig(max_tokens=64))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    planner = new_planner(config, [source], seed=0)
    reader = PackReader([source], config, tiny.tokenizer)
    ledger.add([reader[planner.next_pack()]])
    reader.close()
    # 10 samples were left out in every epoch that the pack opened
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    counts = Counter()
    for line in lines:
        counts[line["dataset"], line["reason"]] += line.get("samples", 1)
    epochs = counts.total() // 10
    assert counts == {("s", "no_media"): 6 * epochs, ("s", "bad_field"): 4 * epochs}
    assert len(lines) == 5 * epochs


def test_too_many_problems_refuse_a_source_though_few_are_listed(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(build, "MAX_LISTED_PROBLEMS", 3)
    with ShardWriter(tmp_path, "s") as writer:
        for number in range(100):
            writer.write(f"{number}", {"caption": "no picture"} if number % 10 == 0 else {"text": "a dog"}, {})
    config = DataConfig({"s": SourceConfig((f"{tmp_path}/s-*.tar",))})
    with pytest.raises(
        ShardError, match=r"10 of 100 samples cannot be used, over max_error_rate 0.05: no_media \(10\)"
    ):
        open_sources(config, tiny.tokenizer)


def test_a_clip_that_hangs_its_decoder_costs_its_sample_alone(tmp_path, monkeypatch):
    endless = "import socket, sys\nc = socket.socket(fileno=int(sys.argv[-1]))\nc.sendall(b'{}\\n')\nwhile True: pass"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda c, **rest: real([c[0], "-c", endless, c[-1]], **rest))
    monkeypatch.setattr(MediaConfig, "decode_timeout_s", 0.3)
    with ShardWriter(tmp_path, "s") as writer:
        writer.write("1", {"caption": "a dog"}, {"0.png": png(30, 20)})
        writer.write("2", {"caption": "a dog"}, {"0.mp4": b"\0\0\0\x18ftypmp42" + bytes(100)})
        writer.write("3", {"caption": "a dog"}, {"0.png": png(30, 20)})
    index = load_index(f"{tmp_path}/s-00000.tar")
    assert [index.key(row) for row in range(index.num_samples)] == ["1", "3"]
    assert [(key, reason) for key, reason, _ in index.problems] == [("2", "decode_timeout")]


def test_samples_are_read_through_the_index(source, tiny):
    samples = list(source.records())
    assert [key for key, *_ in samples] == ["a/1", "a/3"]
    _, record, media, read_member = samples[0]
    assert record.media == {"0.png": media[1][0], "1.png": media[0][0]}
    assert read_member("0.png") == png(60, 40)
    # text tokens leave out the media's runs: "a dog" and the closing token
    assert source.table(0).text_tokens[1] == len(tiny.tokenizer.encode("a dog")) + 1


def test_an_index_outlives_a_copy_and_dies_with_the_content(source, tmp_path, monkeypatch):
    shard = source.shards[0]
    load_index(shard)
    side = tmp_path / ".index" / "s-00000.tar.index"
    with monkeypatch.context() as patched:
        patched.setattr(build, "_build_index", lambda file: pytest.fail("built again"))
        os.utime(shard, (1, 1))
        assert load_index(shard).num_samples == 2
        compared = side.stat().st_mtime_ns  # its time is noted now: it is compared once
        assert load_index(shard).num_samples == 2
        assert side.stat().st_mtime_ns == compared
    with ShardWriter(tmp_path, "s") as writer:
        writer.write("b/1", {"text": "a cat"}, {})
    assert [load_index(shard).key(0)] == ["b/1"]


def test_a_shard_replaced_under_a_running_reader_is_noticed(source, tmp_path):
    source.table(0)
    with open(source.shards[0], "r+b") as file:  # the same size, other members
        data = file.read()
        file.seek(0)
        file.write(data.replace(b"a/1", b"c/1"))
    with pytest.raises(MediaError, match="shard_changed"):
        source.read(0, 0)


def test_a_read_only_folder_uses_the_cache(source, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "SPARE_CACHE", tmp_path / "cache")
    (tmp_path / ".index").write_text("a file where the folder should be")
    assert source.table(0).index.num_samples == 2
    assert sorted(path.name.split("-", 1)[1].split(".tar.")[1][:5] for path in (tmp_path / "cache").iterdir()) == [
        "index",
        "text-",
    ]


def test_another_tokenizer_or_template_changes_the_text_column_only(source, tmp_path, tiny):
    source.table(0)
    built = (tmp_path / ".index" / "s-00000.tar.index").stat().st_ino
    other = SourceIndex("s", source.shards, Counting(tiny.tokenizer, "chatml"))
    assert other.table(0).text_tokens[1] > source.table(0).text_tokens[1]
    assert (tmp_path / ".index" / "s-00000.tar.index").stat().st_ino == built


def build_in_process(shards, counting):
    build_missing(shards, counting)
    return [load_index(shard).num_samples for shard in shards]


def test_processes_that_build_at_once_agree(tiny, tmp_path, counting):
    for path in tiny.folder.glob("*.tar"):
        shutil.copy(path, tmp_path)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        found = [future.result() for future in [pool.submit(build_in_process, shards, counting) for _ in range(3)]]
    assert found == [[8, 8, 4, 8, 7]] * 3
    assert not list(tmp_path.glob(".index/*.part"))


def test_progress_counts_only_what_is_built(tiny, counting, tmp_path):
    for path in tiny.folder.glob("texts-*.tar"):
        shutil.copy(path, tmp_path)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    calls = []
    for _ in range(2):
        build_missing(shards, counting, progress=lambda shard, done, total: calls.append((shard, done, total)))
    assert calls == [(shards[0], 1, 2), (shards[1], 2, 2)]


def test_a_missing_shard_is_an_error_and_the_others_are_built(tiny, counting, tmp_path):
    shutil.copy(next(tiny.folder.glob("texts-00000.tar")), tmp_path / "t.tar")
    with pytest.raises(ShardError, match="unreadable_shard"):
        build_missing([str(tmp_path / "absent.tar"), str(tmp_path / "t.tar")], counting)
    assert (tmp_path / ".index" / "t.tar.index").is_file()


def test_tars_by_other_tools_are_indexed(tmp_path, counting):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("0/7.jpg", png(30, 20)), ("0/7.txt", b"a red dog"), ("0/7.JSON", b'{"url": "x"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = load_index(str(tmp_path / "x.tar"))
    assert (index.key(0), index.media(0)[0][0]) == ("0/7", Media("jpg", "image", 30, 20))


BROKEN = {
    "no json": ({"0.png": png(30, 20)}, "no_record"),
    "no picture": ({"json": b'{"caption": "x"}'}, "no_media"),
    "empty json": ({"json": b"", "0.png": png(30, 20)}, "bad_json"),
    "cut json": ({"json": b'{"caption": "x', "0.png": png(30, 20)}, "bad_json"),
    "empty picture": ({"json": b'{"caption": "x"}', "0.png": b""}, "empty_media"),
    "a page instead of a picture": ({"json": b'{"caption": "x"}', "0.png": b"<html>" * 99}, "not_an_image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_members_cost_their_sample_only(tmp_path, counting, name):
    good = {"json": b'{"caption": "x"}', "0.png": png(30, 20)}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, members in (("1", good), ("2", BROKEN[name][0]), ("3", good)):
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index = load_index(str(tmp_path / "x.tar"))
    assert [index.key(row) for row in range(index.num_samples)] == ["1", "3"]
    assert [(key, reason) for key, reason, _ in index.problems] == [("2", BROKEN[name][1])]


def test_a_missing_folder_is_named_with_its_pattern(tiny):
    config = tiny.config(absent=1.0)
    with pytest.raises(ShardError, match=r"source 'absent': no shard matches '.*absent-\*.tar'"):
        open_sources(config, tiny.tokenizer)
