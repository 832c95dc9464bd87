"""The `deepspeed` launcher: ranks on this machine, and those of a hostfile (one host; ssh has a stand-in)."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import ROOT, environment, metrics, wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SSH = """#!/bin/bash
echo "$*" >>"$(dirname "$0")/asked"
while [ "$1" = -o ]; do shift 2; done
shift  # the host
exec bash -c "$*"
"""


def start(folder: Path, *where: str, **options: object) -> subprocess.Popen[str]:
    """Start training by the launcher; programs in `folder` come before those of the machine."""
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), *where, "--no_local_rank", "--module"]
    paths = environment(PATH=f"{folder}:{os.environ['PATH']}")
    return subprocess.Popen(
        [*launcher, "tests.distributed.trainer_worker", str(folder), json.dumps(options)],
        cwd=ROOT, env=paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(command: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    printed, said = command.communicate(timeout=280)
    return subprocess.CompletedProcess(command.args, command.returncode, printed, said)


def deepspeed(folder: Path, *where: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    return finish(start(folder, *where, **options))


def test_two_ranks_train_to_the_end(tmp_path):
    ended = deepspeed(tmp_path, "--num_gpus", "2", steps=3, packs=4)
    assert ended.returncode == 0, ended.stderr
    assert list(metrics(tmp_path)) == [1, 2, 3]
    assert (tmp_path / "weights.pt").exists()  # what the worker writes for an export
    assert (ended.stdout + ended.stderr).count("exits successfully") == 2


def test_the_cause_of_the_rank_that_holds_the_store_is_said(tmp_path):
    fault = {"kind": "raise", "rank": 0, "step": 1}  # no launcher outlives its store here
    ended = deepspeed(tmp_path, "--num_gpus", "2", steps=9, packs=4, fault=fault)
    assert ended.returncode != 0
    assert "error (rank 0): RuntimeError: the cause lies in pack 4" in ended.stderr
    assert "rank 1 ended: rank 0" in ended.stderr


def test_a_hostfile_of_one_host(tmp_path):
    """The launcher asks even this host by ssh for its name and address; for several it needs pdsh as well."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    ended = deepspeed(tmp_path, "--hostfile", str(tmp_path / "hostfile"), steps=3, packs=4)
    assert ended.returncode == 0, ended.stderr
    assert "localhost hostname" in (tmp_path / "asked").read_text()
    assert list(metrics(tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize("signalled", ["launcher", "rank"])
def test_a_signal_to_the_launcher_or_to_a_rank_ends_all_ranks_with_a_checkpoint(tmp_path, signalled):
    """The launcher answers 1 itself, or with the code of the first rank that left."""
    command = start(tmp_path, "--num_gpus", "2", steps=999, packs=4, step_s=0.1)
    wait_for_step(tmp_path, 2, log=tmp_path / "metrics.jsonl")
    (launcher,) = psutil.Process(command.pid).children()
    ranks = launcher.children()
    (launcher if signalled == "launcher" else ranks[1]).send_signal(signal.SIGTERM)
    ended = finish(command)
    assert ended.returncode == (1 if signalled == "launcher" else 75), ended.stderr
    assert not any(rank.is_running() for rank in ranks)
    (step,) = set(map(int, re.findall(r"main stopped after step (\d+) on", ended.stderr)))
    assert (tmp_path / "main" / "checkpoints" / f"step-{step:08}" / "state.json").is_file()
    assert max(metrics(tmp_path)) == step
