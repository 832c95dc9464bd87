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
from qwen2vl_train.training import environment
from qwen2vl_train.training.failure import exit_after
from qwen2vl_train.training.world import start_world
run, _ = load_config(["experiment=demo", "stage=vision", *sys.argv[1:]])
environment._LATE_S = 1.0
world = start_world(60)
try:
    environment.check_environment(run, world)
except Exception as error:
    exit_after(error, world)
"""

MEET = """
import os, sys, time
from data_pipelines.errors import UserError
from qwen2vl_train.training import meeting, world
meeting._FIRST_S, meeting._GRACE_S = 1.0, 1.0
if sys.argv[1:] == [os.environ["RANK"]]:  # comes, and never connects
    world.dist.init_process_group = lambda *words, **more: time.sleep(1000)
try:
    world.start_world(60, meeting_s=float(os.environ.get("MEETING_S", "3")))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
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
        words, cwd=ROOT, env=environment(**places | address | extra), stdout=subprocess.PIPE,
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
    said = first.communicate(timeout=120)[1] + second.communicate(timeout=60)[1]  # whichever was first, and it alone
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
    while not all(f"rank {rank} works" in log.read_text() for rank in (0, 1)):
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


@pytest.mark.slow
def test_ranks_that_others_do_not_come_to_say_for_whom_they_wait_and_end(tmp_path):
    """Ranks 0 and 1 of 4 share a node, of which one speaks; rank 3 is another node's, which does not find rank 0."""
    port, place = free_port(), "MASTER_ADDR=127.0.0.1 MASTER_PORT="
    meet = [sys.executable, "-c", MEET]
    first, second = (start_rank(meet, rank, 4, port, MEETING_S="10") for rank in (0, 1))
    lost = start_rank(meet, 3, 4, free_port(), LOCAL_RANK="0", MEETING_S="10")
    said, silent, alone = (rank.communicate(timeout=120)[1] for rank in (first, second, lost))
    assert [rank.returncode for rank in (first, second, lost)] == [2, 2, 2]
    assert "2, 3 (the run ends after 10 s, engine.meeting_s)" in said  # rank 1 may not have come by then
    assert f"error: the ranks cannot meet at {place}{port} (" in said
    assert f"waited 10 s (engine.meeting_s) at 127.0.0.1:{port} for 2 of 4 ranks: 2, 3; choose" in said
    assert "the run ends after" not in silent
    assert "error: the ranks cannot meet at" in silent
    assert "for the store of rank 0's machine at 127.0.0.1:" in alone
    assert "which does not answer (the run ends after 10 s" in alone


@pytest.mark.slow
def test_ranks_that_come_and_do_not_reach_each_other_end_too(tmp_path):
    port = free_port()
    first, second = (start_rank([sys.executable, "-c", MEET, "1"], rank, 2, port, MEETING_S="10") for rank in (0, 1))
    said = first.communicate(timeout=120)[1]
    second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (2, 2)
    assert f"for connections: all 2 ranks have come to 127.0.0.1:{port} but do not reach each other" in said


def test_under_torchrun_the_missing_rank_is_named_in_its_closing_words(tmp_path):
    code = f"import os, time\nif os.environ['RANK'] == '1': time.sleep(1000)\n{MEET}"
    (tmp_path / "meet.py").write_text(code.replace("sys.exit(2)", "raise"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launcher, str(tmp_path / "meet.py")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode != 0
    assert "for 1 of 2 ranks: 1" in ended.stderr
