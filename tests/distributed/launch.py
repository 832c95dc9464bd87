"""Start a worker of these tests on several ranks and wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def command(ranks: int, module: str, *arguments: object) -> list[str]:
    """The torchrun command line that runs `module` (with -m) on `ranks` ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "-m", module, *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def torchrun(ranks: int, module: str, *arguments: object, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, module, *arguments),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def train(ranks: int, folder: Path, timeout_s: float = 900, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the real loop on hand-made packs (tests/distributed/trainer_worker.py) to its end."""
    return torchrun(ranks, "tests.distributed.trainer_worker", folder, json.dumps(options), timeout_s=timeout_s)


def start_training(ranks: int, folder: Path, **options: object) -> subprocess.Popen[str]:
    """The same, not waited for; both outputs go to `folder`/log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            command(ranks, "tests.distributed.trainer_worker", folder, json.dumps(options)),
            cwd=ROOT, env=environment(), stdout=log, stderr=log, text=True,
        )  # fmt: skip


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks' processes by rank, once all are there."""
    children = psutil.Process(process.pid).children()
    ranks = [child for child in children if "trainer_worker" in " ".join(child.cmdline())]
    return sorted(ranks, key=lambda child: int(child.environ().get("RANK", "0")))


def metrics(folder: Path) -> dict[int, dict]:
    """Logged figures by step."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["step"]: line for line in lines}


def wait_for_step(folder: Path, step: int, timeout_s: float = 600, log: Path | None = None) -> None:
    """Return once `step` is logged; `log` (the folder's) is shown if it never is."""
    deadline = time.monotonic() + timeout_s
    while max(metrics_so_far(folder), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} not reached: {(log or folder / 'log').read_text()[-2000:]}"
        time.sleep(0.05)


def metrics_so_far(folder: Path) -> list[int]:
    """Logged steps of a run that may be writing its last line."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("}\n")]
