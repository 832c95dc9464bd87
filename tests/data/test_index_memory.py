"""Large indices: opened from the folder's roll, shared by workers, without descriptors."""

import os
import shutil
from dataclasses import replace

import pytest

from benchmarks.index import growth_of_workers, write_index
from data_pipelines.cli import main
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.errors import ShardError
from data_pipelines.index import places, source
from data_pipelines.index.build import Counting, build_missing
from data_pipelines.index.source import SourceIndex
from data_pipelines.index.table import Columns
from data_pipelines.loader import open_sources
from data_pipelines.shards.storage import expand_shards
from data_pipelines.shards.writer import ShardWriter


def copy_shards(tiny, folder, name="texts"):
    for path in tiny.folder.glob(f"{name}-*.tar"):
        shutil.copy(path, folder)
    return expand_shards(name, [f"{folder}/{name}-*.tar"])


def opened(monkeypatch):
    """The shards whose side files are opened from now on."""
    calls = []
    load = source.load_index
    monkeypatch.setattr(source, "load_index", lambda shard, remote: calls.append(shard) or load(shard, remote))
    return calls


@pytest.fixture
def counting(tiny):
    return Counting(tiny.tokenizer, "plain")


def test_workers_share_the_pages_of_an_index(tiny, tmp_path, counting):
    size = write_index(tmp_path, counting, 20_000, 20)
    config = DataConfig({"s": SourceConfig((f"{tmp_path}/s-*.tar",))})
    for worker in growth_of_workers(config, tiny.tokenizer, 4):
        assert worker["index Rss"] > 0.9 * 19 / 20 * size  # one of 20 shards was open before
        assert worker["index Private"] == 0
        assert worker["index Pss"] < 0.3 * worker["index Rss"]


def test_an_open_index_holds_no_descriptor(tiny, tmp_path, counting):
    shards = copy_shards(tiny, tmp_path)
    build_missing(shards, counting)
    held = len(os.listdir("/proc/self/fd"))
    tables = [Columns(path) for path in (tmp_path / ".index").glob("*.index")]
    assert len(tables) == 2
    assert len(os.listdir("/proc/self/fd")) == held


def test_a_source_on_its_roll_opens_without_its_side_files(tiny, tmp_path, counting, monkeypatch):
    shards = copy_shards(tiny, tmp_path)
    calls = opened(monkeypatch)
    assert SourceIndex("texts", shards, counting).num_samples == 15
    assert calls == shards
    assert SourceIndex("texts", shards, counting).num_samples == 15
    build_missing(shards, counting, progress=lambda *_: pytest.fail("all is there"))
    assert calls == shards


def test_a_shard_that_was_touched_or_replaced_is_looked_at_again(tiny, tmp_path, counting, monkeypatch):
    shards = copy_shards(tiny, tmp_path)
    _ = SourceIndex("texts", shards, counting).num_samples
    calls = opened(monkeypatch)
    os.utime(shards[0], (1, 1))
    shutil.copy(tiny.folder / "texts-00000.tar", shards[1])  # 8 samples in the place of 7
    assert SourceIndex("texts", shards, counting).num_samples == 16
    assert calls == shards
    assert SourceIndex("texts", shards, counting).num_samples == 16
    assert calls == shards


def test_sources_that_share_a_folder_share_its_roll(tiny, tmp_path, counting, monkeypatch):
    sources = [copy_shards(tiny, tmp_path, name) for name in ("texts", "pictures")]
    calls = opened(monkeypatch)
    for _ in range(2):
        assert [SourceIndex("s", shards, counting).num_samples for shards in sources] == [15, 20]
    assert sorted(calls) == sorted(sources[0] + sources[1])


def test_another_tokenizer_or_template_has_a_roll_of_its_own(tiny, tmp_path, counting, monkeypatch):
    shards = copy_shards(tiny, tmp_path)
    _ = SourceIndex("texts", shards, counting).num_samples
    calls = opened(monkeypatch)
    _ = SourceIndex("texts", shards, Counting(tiny.tokenizer, "chatml")).num_samples
    assert calls == shards


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 0, "shards": {}}', b'{"format": 1}', b"\xff"])
def test_a_damaged_roll_is_made_anew(tiny, tmp_path, counting, monkeypatch, content):
    shards = copy_shards(tiny, tmp_path)
    _ = SourceIndex("texts", shards, counting).num_samples
    (roll,) = (tmp_path / ".index").glob("*.roll-*")
    roll.write_bytes(content)
    assert SourceIndex("texts", shards, counting).num_samples == 15
    calls = opened(monkeypatch)
    assert SourceIndex("texts", shards, counting).num_samples == 15
    assert calls == []


def test_the_roll_of_a_read_only_folder_lies_in_the_cache(tiny, tmp_path, counting, monkeypatch):
    monkeypatch.setattr(places, "SPARE_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    shards = copy_shards(tiny, tmp_path / "data")
    (tmp_path / "data" / ".index").write_text("a file where the folder should be")
    _ = SourceIndex("texts", shards, counting).num_samples
    calls = opened(monkeypatch)
    assert SourceIndex("texts", shards, counting).num_samples == 15
    assert calls == []


def test_what_is_left_out_counts_against_the_limit_from_the_roll(tiny, tmp_path):
    with ShardWriter(tmp_path, "s") as writer:
        for number in range(100):
            writer.write(f"{number:03d}", {"text": "a dog"} if number < 90 else {"messages": "none"}, {})
    config = DataConfig({"s": SourceConfig((f"{tmp_path}/s-*.tar",))})
    for _ in range(2):
        with pytest.raises(ShardError, match=r"10 of 100 samples cannot be used, over max_error_rate 0.05: bad_field"):
            open_sources(config, tiny.tokenizer)


def test_the_same_lines_with_media_elsewhere_have_counts_of_their_own(tmp_path, counting):
    lines = tmp_path / "train.jsonl"
    lines.write_text('{"text": "a dog"}\n{"text": "a cat"}\n')
    shards = [f"{lines}::{tmp_path}/a", f"{lines}::{tmp_path}/b", str(lines)]
    for _ in range(2):
        assert SourceIndex("lines", shards, counting).num_samples == 6


def test_indexing_ahead_leaves_the_roll(tiny, tmp_path, monkeypatch, capsys):
    shards = copy_shards(tiny, tmp_path)
    assert main(["index", *shards, "--tokenizer", str(tiny.folder / "tokenizer"), "--max-tokens", "192"]) == 0
    calls = opened(monkeypatch)
    config = replace(tiny.config(texts=1.0), sources={"texts": SourceConfig((f"{tmp_path}/texts-*.tar",))})
    open_sources(config, tiny.tokenizer)
    assert calls == []
