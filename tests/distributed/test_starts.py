"""How a run starts: ranks whose folders are not one, ranks that never come, a folder that another run holds."""

import json
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed.launch import ROOT, command, environment

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

CHECK = """
import sys
import time
from qwen2vl_train.overrides import load_config
from qwen2vl_train.training.environment import check_environment
from qwen2vl_train.training.failure import exit_after
from qwen2vl_train.training.world import start_world
run, _ = load_config(["experiment=demo", "stage=vision", *sys.argv[1:]])
world = start_world(60)
try:
    check_environment(run, world)
except Exception as error:
    exit_after(error, world)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_rank(words, rank, ranks, port, **extra):
    """A rank as SLURM and the deepspeed launcher start it."""
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(**places, **address, **extra), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_run_folder_that_is_another_one_on_another_node_is_refused_before_the_first_step(tmp_path):
    """Rank 1 has a disk of its own mounted there, as a node whose scratch disk goes by the same name."""
    folder = tmp_path / "run"
    folder.mkdir()
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(folder)]
    if subprocess.run([*hidden, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a disk for a rank alone")
    check = [sys.executable, "-c", CHECK, f"run_dir={folder}", f"data.root={tmp_path}"]
    port = free_port()
    first, second = start_rank(check, 0, 2, port), start_rank([*hidden, *check], 1, 2, port)
    said = first.communicate(timeout=120)[1]
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (2, 2)
    assert f"rank 1 ({socket.gethostname()}) has another run_dir than rank 0" in said
    assert list(folder.iterdir()) == []


def test_ranks_whose_launcher_is_killed_end_with_it_instead_of_training_on_beside_the_next_start(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        agent = subprocess.Popen(
            command(2, "tests.distributed.ending_worker", tmp_path, json.dumps({"stall_s": 20})),
            cwd=ROOT, env=environment(), stdout=file, stderr=file,
        )  # fmt: skip
    while not all((tmp_path / f"stacks-rank{rank}.txt").exists() for rank in (0, 1)):
        assert agent.poll() is None, log.read_text()
        time.sleep(0.1)
    ranks = psutil.Process(agent.pid).children()
    agent.kill()
    agent.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    for rank in alive:
        rank.kill()
    assert alive == []
    for rank in (0, 1):
        assert f"error (rank {rank}): torchrun (process {agent.pid}) has died on" in log.read_text()
