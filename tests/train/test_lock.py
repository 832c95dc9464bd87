"""One run in one folder: a second one is told who is there; what a dead one left behind is no obstacle."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen2vl_train.config import ConfigError
from qwen2vl_train.overrides import load_config
from qwen2vl_train.stages import _open_run
from qwen2vl_train.training import lock
from qwen2vl_train.training.lock import RunLock
from qwen2vl_train.training.world import World

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from qwen2vl_train.training.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def wait_s(monkeypatch):
    monkeypatch.setattr(lock, "_WAIT_S", 0.5)


def test_a_second_run_in_the_same_folder_is_refused_by_the_first_ones_name_and_changes_nothing(
    tmp_path, other_run, wait_s
):
    run, settings = load_config(["experiment=demo", "stage=language", f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=rf"run_dir={tmp_path} is in use by another run \(process {other_run.pid} on"):
        _open_run(run, tmp_path, settings, World(0, 1, 0, torch.device("cpu")), RunLock(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_file_of_a_killed_run_is_no_obstacle(tmp_path, other_run):
    """The killed one may end only now: as long is waited."""
    held = RunLock(tmp_path)
    other_run.kill()
    assert held.take() is None
    assert str(os.getpid()) in held.path.read_text()


def test_after_a_restart_by_the_launcher_the_run_waits_longer_for_its_predecessor(tmp_path, other_run, wait_s):
    started = time.monotonic()
    killer = subprocess.Popen(["sh", "-c", f"sleep 2; kill -9 {other_run.pid}"])
    assert RunLock(tmp_path).take(restarted=True) is None
    assert time.monotonic() - started > 1
    killer.wait()


def test_a_forked_data_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
    worker.start()
    held.release()
    code = "import sys; from pathlib import Path; from qwen2vl_train.training import lock; lock._WAIT_S = 0; "
    code += "lock.RunLock(Path(sys.argv[1])).take()"
    second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    worker.kill()
    worker.join()
    assert second.returncode == 0, second.stderr


def test_where_the_file_system_knows_no_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", unknown)
    said = RunLock(tmp_path).take()
    assert "cannot be locked" in said
    assert "start no second run in this folder" in said
