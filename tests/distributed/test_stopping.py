"""A signal at any moment of a run ends it with 75, nothing is trained after it, and the same command finishes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import pytest

from qwen2vl_train.training.stopping import StopRequest
from tests.distributed import launch
from tests.distributed.launch import ROOT, environment, metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.faults]


def run_chain(folder, where):
    """One rank through three stages in which nothing is trained; the run, and the pieces of work that were begun."""
    words = [
        sys.executable, "-m", "tests.distributed.chain_worker", where, "experiment=demo",
        "stage=language,vision,multitask", "monitor.wandb=disabled",
        f"run_dir={folder / 'run'}", f"data.root={folder / 'data'}",
        "data.demo={num_pictures: 40, num_clips: 8, num_texts: 20, num_heldout: 2, vocab_size: 700}",
    ]  # fmt: skip
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    return ended, re.findall(r"^(?:fits|scores) \w+", ended.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.mark.parametrize(
    ("where", "stopped", "work"),
    [
        ("data", "stopped before language on SIGTERM", []),
        ("fits language", "stopped before vision on SIGTERM", ["fits language"]),
        ("fits vision", "stopped in the evaluation of vision, 0 of 5 held-out sets done on SIGTERM", ["fits vision"]),
        (
            "set 2 of vision",
            "stopped in the evaluation of vision, 2 of 5 held-out sets done on SIGTERM",
            ["fits vision", "scores vision"],
        ),
        ("set 5 of vision", "stopped before multitask on SIGTERM", ["fits vision", "scores vision"]),
        ("never", "", ["fits multitask", "scores multitask"]),
    ],
)
def test_a_signal_outside_the_loop_ends_the_run_at_the_next_boundary(folder, where, stopped, work):
    """One run_dir in this order: each command goes on where the one before had stopped."""
    ended, begun = run_chain(folder, where)
    assert ended.returncode == (75 if stopped else 0), ended.stderr
    assert stopped in ended.stderr
    assert begun == work


@pytest.mark.parametrize(
    ("command", "order"),
    [
        (["train"], signal.SIGTERM),
        (["train"], signal.SIGUSR1),
        (["train"], signal.SIGINT),
        (["evaluate", "model"], signal.SIGINT),
    ],
)
def test_a_signal_while_the_ranks_meet_ends_at_once_with_75(tmp_path, command, order):
    """The second rank never comes; the wait for it is in C and lasts engine.timeout_s."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "qwen2vl_train", *command, "experiment=demo", f"run_dir={tmp_path}"]
    places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = subprocess.Popen(words, cwd=ROOT, env=environment(**places), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # rank 0 hosts the store that the others would come to
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    rank.send_signal(order)
    said = rank.communicate(timeout=20)[1]
    assert rank.returncode == 75
    assert f"{order.name} while the ranks met: nothing is lost" in said


def test_a_stop_that_was_carried_out_leaves_signals_without_effect_and_else_all_is_as_before():
    """Between the last line of Python and the process's end, torchrun may end it because another rank has left."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            stop.let_end()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_helper_processes_that_the_same_signal_ended_are_no_error_of_their_own():
    """torchrun and a terminal signal the whole process group, pools that index or draw included."""
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.is_cause_of(BrokenProcessPool("a child ended"))
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, stop.reason) == (True, "SIGTERM")
        assert stop.is_cause_of(BrokenProcessPool("a child ended"))
        assert not stop.is_cause_of(RuntimeError("something else"))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    options = {"steps": 3, "packs": 4, "fault": {"kind": "term", "rank": 1, "step": 2}}
    stopped = train(2, tmp_path, **options)
    assert stopped.returncode != 0
    assert "exitcode  : 75" in stopped.stderr
    assert "stopped before the export of main on another rank's signal; the same command continues" in stopped.stderr
    assert not (tmp_path / "weights.pt").exists()  # what the worker writes for an export
    finished = train(2, tmp_path, **options)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "weights.pt").exists()
    assert list(metrics(tmp_path)) == [1, 2, 3]  # no step was made twice


def test_torchrun_with_max_restarts_starts_ranks_that_were_signalled_themselves_again(tmp_path):
    """75 is a failure to torchrun; its own SIGTERM ends it. The ranks meet anew in a store that outlived them."""
    options = {"steps": 4, "packs": 4, "fault": {"kind": "term", "rank": 1, "step": 1}}
    words = launch.command(2, "tests.distributed.trainer_worker", tmp_path, json.dumps(options))
    words.insert(words.index("--standalone"), "--max-restarts=1")
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "stopped after step 3" in ended.stderr  # the signal came in the second one, its labels counted
    assert "step-00000003 after step 3" in ended.stdout
    assert list(metrics(tmp_path)) == [1, 2, 3, 4]
