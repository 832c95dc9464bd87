"""Which course a real chain takes: restarted by its launcher, taken back to an older checkpoint, retrained in part."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "experiment=demo",
    "data.demo={num_pictures: 60, num_clips: 12, num_texts: 60, num_heldout: 2, vocab_size: 1200}",
    *(f"stages.{stage}.schedule.warmup_steps=1" for stage in ("language", "vision")),
    *(f"stages.{stage}.evaluate=false" for stage in ("language", "vision")),
    "stages.vision.steps=2",
    "shared.plan.max_tokens=512",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "monitor.log_every=1",
    "monitor.wandb=disabled",
]


def command(folder, *overrides, restarts=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    places = [f"run_dir={folder / 'run'}", f"data.root={folder / 'data'}"]
    return [*launcher, f"--max-restarts={restarts}", "-m", "qwen2vl_train", "train", *SMALL, *places, *overrides]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(folder, *overrides):
    return subprocess.run(
        command(folder, *overrides),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def steps_logged(folder, stage):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["stage"] == stage and "loss" in line]


@pytest.mark.distributed
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_restart_under_resume_none_and_an_older_checkpoint_and_a_retrained_predecessor(tmp_path):
    """One run after the other in one folder."""
    language = ("stage=language", "stages.language.steps=40")
    first = run(tmp_path, *language, "stages.language.steps=4")
    assert first.returncode == 0, first.stderr[-3000:]

    # killed once it has trained anew beyond a checkpoint: torchrun starts the same command line again
    checkpoints = tmp_path / "run" / "language" / "checkpoints"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(tmp_path, *language, "resume=none", restarts=1),
            cwd=ROOT, env=environment(), stdout=log, stderr=log,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while not (checkpoints / "step-00000006").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in psutil.Process(process.pid).children():
            if "qwen2vl_train" in " ".join(rank.cmdline()):
                rank.kill()
        assert process.wait(250) == 0, (tmp_path / "log").read_text()[-3000:]
    said = (tmp_path / "log").read_text()
    assert "language: started again by the launcher" in said
    assert "resumed from" in said
    assert steps_logged(tmp_path, "language") == list(range(1, 41))

    # an older checkpoint is taken: later ones are gone, and auto knows the new course only
    older = run(tmp_path, *language, f"resume={checkpoints / 'step-00000036'}")
    assert older.returncode == 0, older.stderr[-3000:]
    assert "step-00000040 is of the course that is left" in older.stdout
    assert steps_logged(tmp_path, "language") == list(range(1, 41))

    # the second stage starts from the first, which is then trained anew with another rate
    both = run(tmp_path, "stage=language,vision", language[1])
    assert both.returncode == 0, both.stderr[-3000:]
    assert "language: finished before" in both.stdout
    changed = ("stages.language.steps=4", "stages.language.optim.lr.llm=1e-4")
    anew = run(tmp_path, "stage=language", *changed, "resume=none")
    assert anew.returncode == 0, anew.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (list(summary["stages"]), summary["stale"]) == (["language"], ["vision"])
    refused = run(tmp_path, "stage=language,vision", *changed)
    assert refused.returncode != 0
    assert "stage=vision resume=none" in refused.stderr
    followed = run(tmp_path, "stage=vision", *changed, "resume=none")
    assert followed.returncode == 0, followed.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stale"] == []
