"""The SLURM script with stand-ins for srun and scontrol: environment of the ranks, signal, requeue."""

import os
import signal
import subprocess
import time

import pytest

from tests.distributed.launch import ROOT

SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "srun $1" >>"$RECORD"; shift; done
trap 'kill -USR1 $first $second' USR1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; code=$?
while kill -0 $first 2>/dev/null; do wait $first; code=$?; done
wait $second
exit $code
"""
PYTHON = """#!/bin/bash
echo "rank $RANK of $WORLD_SIZE on $LOCAL_RANK via $MASTER_ADDR:$MASTER_PORT: $*" >>"$RECORD"
trap 'exit 75' USR1
[ -n "$WAIT" ] && for i in $(seq 100); do sleep 0.1; done
exit ${CODE:-0}
"""
SCONTROL = """#!/bin/bash
case "$1" in show) echo node0; echo node1 ;; *) echo "scontrol $*" >>"$RECORD" ;; esac
"""


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job of two tasks whose programs write what they are asked into `RECORD`."""
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "WAIT": "",
    }


def submit(environment):
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "experiment=demo"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def record(cluster):
    with open(cluster["RECORD"], encoding="utf-8") as file:
        return sorted(file.read().splitlines())


@pytest.mark.parametrize("code", [0, 1])
def test_each_task_is_a_rank_and_an_ordinary_end_is_the_jobs_end(cluster, code):
    assert submit(cluster | {"CODE": str(code)}).wait(30) == code
    assert record(cluster) == [
        *(f"rank {rank} of 2 on {rank} via node0:20007: -u -m qwen2vl_train train experiment=demo" for rank in (0, 1)),
        "srun --cpus-per-task=3",  # without it each rank and its data workers would share one core
        "srun --kill-on-bad-exit=0",
    ]


def test_a_preempted_job_goes_back_to_the_queue(cluster):
    job = submit(cluster | {"WAIT": "1"})
    while not os.path.exists(cluster["RECORD"]) or sum(line.startswith("rank") for line in record(cluster)) < 2:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(job.pid), "-f", "srun"], capture_output=True, text=True).stdout
    os.kill(int(children.split()[0]), signal.SIGUSR1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75
    assert "scontrol requeue 7" in record(cluster)


def test_tasks_that_end_as_the_script_is_signalled_are_requeued_all_the_same(cluster, tmp_path):
    """Twenty times, since which of the two bash sees first is a matter of microseconds."""
    (tmp_path / "srun").write_text("#!/bin/bash\nkill -TERM $PPID\nexit 75\n")
    assert [submit(cluster).wait(30) for _ in range(20)] == [75] * 20
    assert record(cluster) == ["scontrol requeue 7"] * 20


@pytest.mark.parametrize("code", [74, 76, 127, 143])
def test_no_other_end_is_requeued(cluster, tmp_path, code):
    (tmp_path / "srun").write_text(f"#!/bin/bash\nkill -TERM $PPID\nexit {code}\n")
    assert submit(cluster).wait(30) == code
    assert not os.path.exists(cluster["RECORD"])
