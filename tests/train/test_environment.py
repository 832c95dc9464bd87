"""The check before the first step: what differs between ranks is found and named."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qwen2vl_train.overrides import load_config
from qwen2vl_train.training.environment import (
    RankFacts,
    _later,
    _shards,
    check_environment,
    find_faults,
    find_lack_of_room,
)
from qwen2vl_train.training.world import end_world, start_world

FACTS = RankFacts(
    0,
    "a",
    "CPU",
    {"python": "3.11.7", "torch": "2.13.0"},
    1000.0,
    50.0,
    24.0,
    {"vision": "2 shards, 7 bytes"},
    later={"data.tokenizer=t": "1 files, 9 bytes"},
)


def test_equal_ranks_have_no_fault():
    assert find_faults([FACTS, replace(FACTS, rank=1, host="b", clock_s=1002.0, free_gb=1.0)]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": FACTS.versions | {"torch": "2.12.0"}}, ["rank 1 (b) has torch 2.12.0, rank 0 (a) 2.13.0"]),
        ({"shards": {"vision": "1 shards, 3 bytes"}}, ["rank 1 (b) sees for stage vision: 1 shards, 3 bytes"]),
        ({"clock_s": 1061.0}, ["+61 s off"]),
        ({"run_dir": False}, ["rank 1 (b) has another run_dir than rank 0 (a)", "that all nodes share"]),
        (
            {"later": {"data.tokenizer=t": "0 files, 0 bytes"}},
            ["rank 1 (b) sees for data.tokenizer=t: 0 files, 0 bytes"],
        ),
    ],
)
def test_what_differs_is_named_with_both_sides(change, words):
    (fault,) = find_faults([FACTS, replace(FACTS, rank=1, host="b", **change)])
    for word in words:
        assert word in fault


def test_the_table_names_devices_versions_and_shards(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    run, _ = load_config(["experiment=demo", "stage=vision", f"run_dir={tmp_path}", f"data.root={tmp_path}"])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "captions-00000.tar").write_bytes(b"12345")
    (tmp_path / "train" / "words-00000.tar").write_bytes(b"123")
    world = start_world(30)
    try:
        table = check_environment(run, world)
    finally:
        end_world()
    assert "1 rank(s) over gloo: all-reduce" in str(table.title)
    assert "torch 2." in str(table.caption)
    assert "vision: 2 shards, 8 bytes" in str(table.caption)


def test_files_of_json_lines_are_counted_wherever_their_media_lie(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"123")
    source = f"{{lines: {{shards: ['{tmp_path}/a.jsonl::{tmp_path}/media']}}}}"
    run, _ = load_config(["experiment=demo", "~stages.vision.data.sources", f"stages.vision.data.sources={source}"])
    assert _shards(run, "vision") == "1 shards, 3 bytes"


def test_what_is_first_read_later_on_is_looked_at_before_the_first_step(tmp_path):
    (tmp_path / "start").mkdir()
    for name, size in (("config.json", 2), ("model.safetensors", 70), ("README.md", 5)):  # notes may differ
        (tmp_path / "start" / name).write_bytes(b"x" * size)
    (tmp_path / "vqa.tar").write_bytes(b"12345")
    places = [f"data.tokenizer={tmp_path}/none", f"stages.vision.init_from={tmp_path}/start"]
    run, _ = load_config(["experiment=demo", "stage=vision", *places])
    run = replace(run, data=replace(run.data, heldout={"vqa": f"{tmp_path}/vqa.tar"}))
    assert _later(run) == {
        f"data.tokenizer={tmp_path}/none": "0 files, 0 bytes",
        f"stages.vision.init_from={tmp_path}/start": "2 files, 72 bytes",
        f"data.heldout.vqa={tmp_path}/vqa.tar": "1 shards, 5 bytes",
    }


def test_a_disk_too_small_for_a_checkpoint_and_an_export_is_told_before_the_first_step(tmp_path, monkeypatch):
    """2B, all parts trained: 2,208,985,600 parameters in bf16 (4.4 GB twice) and 12 bytes for each that trains."""
    places = [f"data.root={tmp_path}", "data.tokenizer=t", f"run_dir={tmp_path}"]
    run, _ = load_config(["experiment=qwen2vl_2b", "stage=multitask", *places, "checkpoint.min_free_gb=1"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=36.3e9))
    said = find_lack_of_room(run, run.model.config)
    assert (
        f"run_dir={tmp_path} has 36.3 GB free: too little for a checkpoint (about 30.9 GB), an export (4.4 GB)" in said
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=36.4e9))
    assert find_lack_of_room(run, run.model.config) is None
