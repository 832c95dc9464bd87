"""The check before the first step: what differs between ranks is found and named."""

from dataclasses import replace

import pytest

from qwen2vl_train.overrides import load_config
from qwen2vl_train.training.environment import RankFacts, _shards, check_environment, find_faults
from qwen2vl_train.training.world import end_world, start_world

FACTS = RankFacts(
    0, "a", "CPU", {"python": "3.11.7", "torch": "2.13.0"}, 1000.0, 50.0, 24.0, {"vision": "2 shards, 7 bytes"}
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
    assert "1 rank(s), all-reduce" in str(table.title)
    assert "torch 2." in str(table.caption)
    assert "vision: 2 shards, 8 bytes" in str(table.caption)


def test_files_of_json_lines_are_counted_wherever_their_media_lie(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"123")
    source = f"{{lines: {{shards: ['{tmp_path}/a.jsonl::{tmp_path}/media']}}}}"
    run, _ = load_config(["experiment=demo", "~stages.vision.data.sources", f"stages.vision.data.sources={source}"])
    assert _shards(run, "vision") == "1 shards, 3 bytes"
