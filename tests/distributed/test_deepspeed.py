"""The `deepspeed` launcher: ranks on this machine, and those of a hostfile (one host; ssh has a stand-in)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, environment, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SSH = """#!/bin/bash
echo "$*" >>"$(dirname "$0")/asked"
while [ "$1" = -o ]; do shift 2; done
shift  # the host
exec bash -c "$*"
"""


def deepspeed(folder: Path, *where: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Train by the launcher; programs in `folder` come before those of the machine."""
    launcher = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), *where, "--no_local_rank", "--module"]
    paths = environment(PATH=f"{folder}:{os.environ['PATH']}")
    return subprocess.run(
        [*launcher, "tests.distributed.trainer_worker", str(folder), json.dumps(options)],
        cwd=ROOT, env=paths, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


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
