"""A rank that hangs or fails is named, with what it was doing, and nobody waits for it."""

import signal
import time

import pytest

from qwen2vl_train.training.watchdog import Beat, describe_stall, find_stalled
from tests.distributed.launch import start_training, train, wait_for_step, workers_of

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.timeout(1000)]
WAITING = (
    '  File "/work/trainer.py", line 9, in fit\n  File "/x/torch/distributed/distributed_c10d.py", line 1, in wait'
)


def beat(rank, notes, stack="", tick=9):
    return Beat(rank, "host", 100 + rank, tick, notes, "forward and backward of pack 7", ("key-7-0",), 11.0, stack)


def test_the_rank_with_the_fewest_notes_holds_up_the_others():
    assert find_stalled({0: beat(0, 5), 1: beat(1, 4), 2: beat(2, 5)}, set()) == [1]


def test_among_equals_it_is_the_one_outside_a_collective():
    assert find_stalled(
        {0: beat(0, 5, WAITING), 1: beat(1, 5, '  File "/x/deepspeed/engine.py", line 1, in f\n  File "/x/decode.py"')},
        set(),
    ) == [1]
    assert find_stalled({0: beat(0, 5, WAITING), 1: beat(1, 5, WAITING)}, set()) == [0, 1]


def test_a_silent_rank_comes_first():
    beats = {0: beat(0, 3), 1: beat(1, 5)}
    assert find_stalled(beats, {1}) == [1]
    assert "rank 1 holds up the others: its process is stopped" in describe_stall(beats, {1}, "10 s")
    assert "rank 2: never sent anything" in describe_stall(beats, {2}, "10 s")


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("data", ["waiting for the packs of step 3", "samples: worker of rank 1 at step 2", "in timed_next"]),
        ("forward", ["It was at: forward and backward of pack 9", "samples: key-9-0", "time.sleep(1000)"]),
        ("stop", ["sends nothing any more", "its process is stopped", "forward and backward of pack 9", "key-9-0"]),
    ],
)
def test_a_hanging_rank_is_named_with_its_activity_samples_and_stack(tmp_path, kind, wanted):
    """Rank 1 hangs in step 3 (packs 8 to 11; rank 1 has 9 and 11)."""
    started = time.monotonic()
    finished = train(2, tmp_path, steps=9, packs=4, fault={"kind": kind, "rank": 1, "step": 2}, watchdog={"stall_s": 6})
    assert time.monotonic() - started < 300
    assert finished.returncode != 0
    assert "STALLED" in finished.stderr
    assert "rank 1 holds up the others" in finished.stderr
    assert "rank 0 holds up" not in finished.stderr
    for words in wanted:
        assert words in finished.stderr, words
    assert (tmp_path / "stall.txt").read_text().strip() in finished.stderr
    closing = finished.stderr[finished.stderr.rindex("Root Cause") :]
    assert "rank 1 holds up the others" in closing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "activity", "place"),
    [("save", "writing the checkpoint of step 2", "in save"), ("export", "exporting main", "in export")],
)
def test_a_rank_that_hangs_outside_the_steps_is_named(tmp_path, kind, activity, place):
    limits = {"stall_s": 20, "save_s": 25}
    finished = train(2, tmp_path, steps=2, packs=4, fault={"kind": kind, "rank": 1}, watchdog=limits)
    assert finished.returncode != 0
    assert f"rank 1 holds up the others. It was at: {activity}\n" in finished.stderr
    assert "rank 0 holds up" not in finished.stderr
    assert place in finished.stderr


def test_an_exception_on_one_rank_ends_the_others_and_is_said_last(tmp_path):
    folder = tmp_path / "run"
    process = start_training(2, folder, steps=99, packs=4, fault={"kind": "raise", "rank": 1, "step": 2})
    wait_for_step(folder, 2)
    started = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - started < 30
    log = (folder / "log").read_text()
    assert "error (rank 1): RuntimeError: the cause lies in pack 9" in log
    # torchrun's closing words, whichever rank it saw end first; only the ruled line comes after them
    closing = log[log.rindex("Root Cause") :].rstrip().rstrip("=").rstrip()
    assert closing.endswith("error (rank 1): RuntimeError: the cause lies in pack 9")


def test_a_killed_rank_ends_the_others_within_30_s(tmp_path):
    folder = tmp_path / "run"
    process = start_training(2, folder, steps=999, packs=4, step_s=0.1)
    wait_for_step(folder, 2)
    started = time.monotonic()
    workers_of(process)[0].send_signal(signal.SIGKILL)
    assert process.wait(60) != 0
    assert time.monotonic() - started < 30
