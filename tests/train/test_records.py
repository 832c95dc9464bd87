"""What a stage wrote of single packs stands there once, however often it is stopped and goes on."""

import doctest
import json
import resource
import signal

import pytest

from qwen2vl_train.training import records
from qwen2vl_train.training.records import Record, add_change, forget_packs, take_changes


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


def test_lines_that_ran_into_each_other_go_and_the_run_goes_on(tmp_path):
    """As earlier releases left them after a full disk: half a line, and the next one behind it."""
    for name in ("ledger-rank0", "skipped_updates", "spikes", "data_changes"):
        write(
            tmp_path / f"{name}.jsonl", [{"pack": 6}], rest='{"pack": 7, "messa{"pack": 7, "key": "b"}\n{"pack": 7}\n'
        )
        forget_packs(tmp_path, {"plan": {"number": 8}})
        assert read(tmp_path / f"{name}.jsonl") == [{"pack": 6}, {"pack": 7}]


def test_lines_that_find_no_room_leave_no_half_one_behind(tmp_path):
    """A limit on the file's size stands in for the disk; half a line amid the others would end the next resume."""
    said = []
    record = Record(tmp_path / "skipped_updates.jsonl", said.append)
    record.add([{"step": 1, "pack": 3}])
    size, limits = record.path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
        record.add([{"step": 2, "pack": 6}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    record.add([{"step": 3, "pack": 9}, {"step": 3, "pack": 8}])
    assert read(record.path) == [{"step": 1, "pack": 3}, {"step": 3, "pack": 9}, {"step": 3, "pack": 8}]
    assert len(said) == 1


def test_a_stage_without_a_checkpoint_begins_with_empty_records(tmp_path):
    write(tmp_path / "ledger-rank0.jsonl", [{"pack": 0, "key": "a"}])
    forget_packs(tmp_path, None)
    assert read(tmp_path / "ledger-rank0.jsonl") == []


def test_a_change_of_data_stands_with_its_state_until_a_checkpoint_before_it_is_gone_on_from(tmp_path):
    changes = tmp_path / "data_changes.jsonl"
    states = [{"identity": {}, "plan": {"number": number}} for number in (8, 20)]
    add_change(tmp_path, 2, states[0], ["source a is new"])
    add_change(tmp_path, 5, states[1], ["source a is gone"])
    assert read(changes)[1] == {"step": 5, "pack": 20, "changes": ["source a is gone"], "loader": states[1]}
    forget_packs(tmp_path, {"plan": {"number": 24}})
    assert [line["pack"] for line in read(changes)] == [8, 20]
    forget_packs(tmp_path, {"plan": {"number": 20}})  # the checkpoint that the change began from: it is made again
    assert [line["pack"] for line in read(changes)] == [8]
    forget_packs(tmp_path, None)
    assert read(changes) == []


def test_a_checkpoint_of_another_run_brings_the_changes_before_it(tmp_path):
    mine, other, copies = (tmp_path / run / "vision" for run in ("mine", "other", "copies"))
    for folder in (mine, other, copies):
        (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    add_change(mine, 1, {"plan": {"number": 4}}, ["mine"])
    for checkpoint in (mine, copies):  # `copies` is no run's folder, but where someone keeps checkpoints
        take_changes(mine, checkpoint / "checkpoints" / "step-00000003")
        assert [line["changes"] for line in read(mine / "data_changes.jsonl")] == [["mine"]]
    (other / "settings.json").write_text("{}")
    add_change(other, 2, {"plan": {"number": 8}}, ["theirs"])
    take_changes(mine, other / "checkpoints" / "step-00000003")
    assert [line["changes"] for line in read(mine / "data_changes.jsonl")] == [["theirs"]]
    (other / "data_changes.jsonl").unlink()
    take_changes(mine, other / "checkpoints" / "step-00000003")
    assert not (mine / "data_changes.jsonl").exists()


def test_the_examples_in_its_docstrings():
    assert doctest.testmod(records).failed == 0
