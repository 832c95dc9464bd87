"""How a run ends outside its steps, and without torchrun: first causes, stalls on a full disk, stacks that are kept."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.distributed.launch import ROOT, environment

pytestmark = [pytest.mark.distributed, pytest.mark.faults]


def start_ranks(folder, ranks, stderr=subprocess.PIPE, **options):
    """Bare ranks, as SLURM and the deepspeed launcher start them: the store lives in rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tests.distributed.ending_worker", str(folder), json.dumps(options)]
    places = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **places), stderr=stderr, text=True
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("collective", [False, True], ids=["in no collective that ends", "in a collective of gloo"])
def test_the_cause_of_the_rank_that_hosts_the_store_reaches_the_others(tmp_path, collective):
    first, second = start_ranks(tmp_path, 2, fails=0, collective=collective)
    said = first.communicate(timeout=120)[1]
    ended = time.monotonic()
    told = second.communicate(timeout=60)[1]
    assert time.monotonic() - ended < 30
    assert (first.returncode, second.returncode) == (1, 1)
    assert said.rstrip().endswith("error (rank 0): RuntimeError: the weights are of another model")
    assert "rank 1 ended: rank 0" in told
    assert told.rstrip().endswith("error (rank 0): RuntimeError: the weights are of another model")


@pytest.mark.parametrize("stall_s", [60, 0], ids=["watched", "with the watchdog's stalls switched off"])
def test_a_rank_that_fails_outside_the_loop_ends_those_that_wait_for_it(tmp_path, stall_s):
    first, second = start_ranks(tmp_path, 2, fails=1, stall_s=stall_s)
    second.communicate(timeout=120)
    ended = time.monotonic()
    told = first.communicate(timeout=60)[1]
    assert time.monotonic() - ended < 30
    assert told.rstrip().endswith("error (rank 1): RuntimeError: the weights are of another model")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("defect", 1, "in fail\n    list(zip([1], [], strict=True))\n"),
        ("mistake", 2, "error (rank 0): shards/a.tar: no such file"),
        ("disk", 2, "error (rank 0): [Errno 28] No space left on device: 'run/spikes.jsonl'; make room"),
    ],
)
def test_a_defect_shows_its_traceback_and_a_mistake_one_line(tmp_path, error, code, said):
    """Both are ValueErrors; a defect is none of the user's."""
    (rank,) = start_ranks(tmp_path, 1, fails=0, error=error)
    told = rank.communicate(timeout=120)[1]
    assert rank.returncode == code
    assert said in told
    assert ("Traceback" in told) == (error == "defect")


def test_a_stalled_rank_ends_with_76_though_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with open("/dev/full", "w") as full:
        (rank,) = start_ranks(tmp_path / "file" / "run", 1, stderr=full, stall_s=1)
        assert rank.wait(120) == 76


def test_a_second_stall_leaves_the_first_ones_report_and_stacks(tmp_path):
    for _ in range(2):
        (rank,) = start_ranks(tmp_path, 1, stall_s=1)
        assert "It was at: loading the model" in rank.communicate(timeout=120)[1]
        assert rank.returncode == 76
    assert (tmp_path / "stall.txt").read_text().count("STALLED") == 2
    assert (tmp_path / "stacks-rank0.txt").read_text().count("ending_worker.py") >= 2


def test_a_rank_whose_c_code_holds_the_interpreter_ends_though_no_other_rank_can_end_it(tmp_path):
    """Its watchdog cannot run; in a world of one, on another node, or with all ranks in such a call none else does."""
    patch = {"_ANSWER_S": 1.0}
    (rank,) = start_ranks(tmp_path, 1, stall_s=1, holds="all", hold_s=1000, patch=patch)
    told = rank.communicate(timeout=60)[1]
    assert rank.returncode == -signal.SIGALRM
    assert "ending_worker.py" in told
    assert " in run" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"stall_s": 1, "limit_s": 60}, {"stall_s": 0}],
    ids=["under a longer limit", "with the watchdog's stalls switched off"],
)
def test_c_code_that_holds_the_interpreter_within_its_limit_is_not_cut_short(tmp_path, options):
    patch = {"_ANSWER_S": 0.1, "_PATIENCE_TICKS": 1}
    (rank,) = start_ranks(tmp_path, 1, holds="all", hold_s=3, patch=patch, **options)
    told = rank.communicate(timeout=60)[1]
    assert rank.returncode == 0, told


@pytest.mark.slow
def test_another_rank_of_the_host_reports_the_one_that_holds_the_interpreter_and_has_its_stack_written(tmp_path):
    first, second = start_ranks(tmp_path, 2, stall_s=3, holds=1, hold_s=1000)
    told, stack = (rank.communicate(timeout=60)[1] for rank in (first, second))
    assert (first.returncode, second.returncode) == (76, -signal.SIGALRM)
    assert "rank 1 holds up the others: its process is stopped, gone, cut off, or holds the interpreter" in told
    assert " in run" in stack


@pytest.mark.slow
def test_a_process_that_does_not_end_after_its_work_is_ended(tmp_path):
    (rank,) = start_ranks(tmp_path, 1, ends=True, patch={"_EXIT_S": 1.0})
    rank.communicate(timeout=60)
    assert rank.returncode == -signal.SIGALRM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "activity"), [("monitor starts", "starting the monitor"), ("monitor ends", "ending")]
)
def test_a_rank_that_hangs_before_or_after_all_stages_is_named(tmp_path, where, activity):
    words = [
        sys.executable, "-m", "tests.distributed.chain_worker", where, "experiment=demo", "stage=language",
        "monitor.wandb=disabled", "watchdog={stall_s: 10, save_s: 10}",
        f"run_dir={tmp_path / 'run'}", f"data.root={tmp_path / 'data'}",
        "data.demo={num_pictures: 40, num_clips: 8, num_texts: 20, num_heldout: 2, vocab_size: 700}",
    ]  # fmt: skip
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 76, ended.stderr
    assert f"It was at: {activity}\n" in ended.stderr


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        command = [sys.executable, "-m", "qwen2vl_train", "train", "experiment=demo", f"run_dir={tmp_path}"]
        places = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = subprocess.run(
            command, cwd=ROOT, env=environment(**places), capture_output=True, text=True, timeout=120, check=False
        )
    assert ended.returncode == 2
    assert f"error (rank 0): the ranks cannot meet at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} (" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_rank_that_fails_in_an_evaluation_ends_the_others(tmp_path):
    """The other one waits as in a collective of NCCL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code = (
        "import sys, time; from qwen2vl_train import cli; from qwen2vl_train.evaluation import runner\n"
        "def evaluate(model, heldout, data, config, world, *more):\n"
        "    if world.rank: raise RuntimeError('the cause')\n"
        "    time.sleep(1000)\n"
        "runner.evaluate = evaluate; sys.exit(cli.main(['evaluate', 'x', 'experiment=demo']))"
    )
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(RANK=rank, **places),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    assert "error (rank 1): RuntimeError: the cause" in second.communicate(timeout=120)[1]
    ended = time.monotonic()
    assert first.communicate(timeout=60)[1].rstrip().endswith("error (rank 1): RuntimeError: the cause")
    assert time.monotonic() - ended < 30


@pytest.mark.slow
def test_a_rank_that_hangs_in_an_evaluation_is_named_with_the_samples_it_answers():
    code = (
        "import sys, time; from qwen2vl_train import cli; from qwen2vl_train.evaluation import runner\n"
        "def evaluate(model, heldout, data, config, world, scored, at):\n"
        "    scored(1)\n"
        "    at[:] = ['key-7']\n"
        "    time.sleep(1000)\n"
        "runner.evaluate = evaluate\n"
        "sys.exit(cli.main(['evaluate', 'x', 'experiment=demo', 'watchdog={stall_s: 3, save_s: 3}']))"
    )
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 76, ended.stderr
    assert "It was at: evaluating, 1 sets done\nsamples: key-7\n" in ended.stderr
    assert "in evaluate" in ended.stderr
