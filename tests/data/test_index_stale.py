"""Shards that change at equal size, where the content tag does not look: the index notices, or names what helps."""

import os
import shutil

import pytest

from data_pipelines.cli import main
from data_pipelines.config import DataConfig, PlanConfig, SourceConfig
from data_pipelines.index import build
from data_pipelines.index.build import Counting, build_missing, load_index
from data_pipelines.index.source import SourceIndex
from data_pipelines.loader import new_planner, open_sources
from data_pipelines.pack.read import PackReader
from data_pipelines.shards.storage import LocalFile
from data_pipelines.shards.writer import ShardWriter

OLD, NEW = b"a red dog sits on the green hill", b"zq zq zq zq zq zq zq zq zq zq zq"  # more tokens


@pytest.fixture
def counting(tiny):
    return Counting(tiny.tokenizer, "plain")


@pytest.fixture
def shard(tmp_path):
    """60 texts; the one in the middle lies between the blocks that the tag looks at."""
    with ShardWriter(tmp_path, "s") as writer:
        for number in range(60):
            text = "a red dog sits on the green hill" if number == 10 else "two birds fly over water"
            writer.write(f"{number:02d}", {"text": text}, {})
    return str(tmp_path / "s-00000.tar")


def change(path, keep_time=False):
    """Replace a caption by one of the same length, in place; the size and the tag stay."""
    facts, tag = os.stat(path), tag_of(path)
    with open(path, "r+b") as file:
        data = file.read()
        assert data.count(OLD) == 1
        file.seek(0)
        file.write(data.replace(OLD, NEW))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + (0 if keep_time else 1)))
    assert tag_of(path) == tag
    assert os.stat(path).st_size == facts.st_size


def tag_of(path):
    file = LocalFile(path)
    tag = file.tag()
    file.close()
    return tag


def test_a_caption_mended_in_place_is_counted_anew(shard, counting):
    before = SourceIndex("s", [shard], counting)
    tokens, fingerprint = before.table(0).text_tokens.copy(), before.fingerprint
    change(shard)
    build_missing([shard], counting)
    after = SourceIndex("s", [shard], counting)
    assert after.table(0).text_tokens[10] > tokens[10]
    assert (after.table(0).text_tokens != tokens).sum() == 1
    assert after.fingerprint != fingerprint


def test_a_data_set_that_was_copied_keeps_its_index_and_its_fingerprint(shard, counting, tmp_path, monkeypatch):
    fingerprint = SourceIndex("s", [shard], counting).fingerprint
    shutil.copytree(tmp_path / ".index", tmp_path / "copy" / ".index")
    copy = shutil.copyfile(shard, tmp_path / "copy" / "s-00000.tar")
    os.utime(copy, (1, 1))
    monkeypatch.setattr(build, "_build_index", lambda file: pytest.fail("built again"))
    monkeypatch.setattr(build, "_count_text", lambda file, *_: pytest.fail("counted again"))
    build_missing([str(copy)], counting)
    assert SourceIndex("s", [str(copy)], counting).fingerprint == fingerprint


def packs_events(source, tiny):
    config = DataConfig({"s": SourceConfig(tuple(source.shards))}, plan=PlanConfig(max_tokens=64))
    reader = PackReader([source], config, tiny.tokenizer)
    planner = new_planner(config, [source], seed=0)
    events = [event for _ in range(40) for event in reader[planner.next_pack()].events]
    reader.close()
    return events


def test_a_change_behind_the_indexs_back_is_no_defect_of_the_program(shard, counting, tiny):
    source = SourceIndex("s", [shard], counting)
    source.table(0)
    change(shard, keep_time=True)
    (event, *_) = packs_events(SourceIndex("s", [shard], counting), tiny)
    assert (event.key, event.reason) == ("10", "shard_changed")
    assert "defect" not in event.message
    assert "index --rebuild" in event.message
    assert ".index/s-00000.tar.*" in event.message


def test_a_wrong_count_of_a_shard_as_it_was_indexed_is_a_defect(shard, counting, tiny, monkeypatch):
    count = build._count_text

    def miscount(*arguments):
        arrays, meta = count(*arguments)
        arrays["tokens"][10] += 1
        return arrays, meta

    monkeypatch.setattr(build, "_count_text", miscount)
    (event, *_) = packs_events(SourceIndex("s", [shard], counting), tiny)
    assert (event.key, event.reason) == ("10", "plan_mismatch")
    assert event.message.startswith("defect of this program: 10: planned")


def test_rebuild_indexes_anew_whatever_size_and_time_say(shard, counting, tiny, capsys):
    words = ["index", shard, "--tokenizer", tiny.tokenizer.path]
    assert main(words) == 0
    tokens = SourceIndex("s", [shard], counting).table(0).text_tokens.copy()
    change(shard, keep_time=True)
    assert main(words) == 0
    assert (SourceIndex("s", [shard], counting).table(0).text_tokens == tokens).all()
    assert main([*words, "--rebuild"]) == 0
    source = SourceIndex("s", [shard], counting)
    assert source.table(0).text_tokens[10] > tokens[10]
    # the folder's roll tells of the new content, too
    fresh = load_index(shard).mark
    assert source.counts().marks == (fresh,)


def test_a_mended_shard_is_another_one_on_resume(shard, tiny):
    config = DataConfig({"s": SourceConfig((shard,))}, plan=PlanConfig(max_tokens=64))
    (before,) = open_sources(config, tiny.tokenizer)
    fingerprint = before.fingerprint
    change(shard)
    (after,) = open_sources(config, tiny.tokenizer)
    assert after.fingerprint != fingerprint
