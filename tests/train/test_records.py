"""What a stage wrote of single packs stands there once, however often it is stopped and goes on."""

import doctest
import json

import pytest

from qwen2vl_train.training import records
from qwen2vl_train.training.records import forget_packs


def write(path, lines, rest=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("state", [{"plan": {"number": 8}}, {"stream": {"packs": 8}}], ids=["plan", "stream"])
def test_lines_of_packs_that_are_trained_again_go_with_a_half_last_one(tmp_path, state):
    write(tmp_path / "ledger-rank0.jsonl", [{"pack": 7, "key": "a"}, {"pack": 8, "key": "b"}])
    write(tmp_path / "ledger-rank1.jsonl", [{"pack": 3, "key": "a"}], rest='{"pack": 4, "ke')
    write(tmp_path / "skipped_updates.jsonl", [{"step": 2, "pack": 6}, {"step": 3, "pack": 9}])
    # a spike behind which the checkpoint lies, although its step is still to come again, with other packs
    passed = {"step": 9, "packs": [{"pack": 6}, {"pack": 7}], "returned_to": 1}
    ahead = {"step": 3, "packs": [{"pack": 8}, {"pack": 9}], "returned_to": 2}
    write(tmp_path / "spikes.jsonl", [passed, ahead])
    forget_packs(tmp_path, state)
    assert read(tmp_path / "ledger-rank0.jsonl") == [{"pack": 7, "key": "a"}]
    assert read(tmp_path / "ledger-rank1.jsonl") == [{"pack": 3, "key": "a"}]
    assert read(tmp_path / "skipped_updates.jsonl") == [{"step": 2, "pack": 6}]
    assert read(tmp_path / "spikes.jsonl") == [passed]


def test_a_stage_without_a_checkpoint_begins_with_empty_records(tmp_path):
    write(tmp_path / "ledger-rank0.jsonl", [{"pack": 0, "key": "a"}])
    forget_packs(tmp_path, None)
    assert read(tmp_path / "ledger-rank0.jsonl") == []


def test_the_examples_in_its_docstrings():
    assert doctest.testmod(records).failed == 0
