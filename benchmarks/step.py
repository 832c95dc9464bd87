"""A step of the trainer, with all that its loop calls, against plain PyTorch DDP on the same packs, 2 CPU ranks.

    python -m benchmarks.step [--rounds 5] [--steps 3]

The three ways take turns in the same two processes, so that a busy machine slows them alike; medians over the rounds.
Checkpoints are timed apart, and the watchdog's thread (a message every 5 s) runs beside all three ways.
DDP gets packs that were decoded beforehand: `wrap_ratio` (ZeRO-1) and `wrap_ratio_zero3` hold the loader's work, too;
`engine_ratio` and `engine_ratio_zero3` leave the waiting for packs out. Then a checkpoint, its loading, and the time
from the launcher's start to the end of the first step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.samples import PackedBatch
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import RunConfig, StageConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.overrides import load_config
from qwen2vl_train.stages import model_config, prepare_data
from qwen2vl_train.training.ahead import DeviceFeed
from qwen2vl_train.training.checkpoint import CheckpointStore
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.guard import Guard
from qwen2vl_train.training.journal import Journal
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.optim import build_optimizer, parameter_groups
from qwen2vl_train.training.schedule import rate_factor
from qwen2vl_train.training.spikes import SpikeGuard
from qwen2vl_train.training.step import train_step
from qwen2vl_train.training.stopping import StopRequest
from qwen2vl_train.training.watchdog import Watchdog
from qwen2vl_train.training.window import Progress
from qwen2vl_train.training.world import World, end_world, start_world

ROOT = Path(__file__).resolve().parents[1]
RANKS, TOKENS = 2, 4096
SETTINGS = [
    "experiment=demo",
    "stage=multitask",
    "data.demo={num_pictures: 1200, num_clips: 40, num_texts: 600, num_heldout: 8, vocab_size: 1200}",
    f"shared.plan={{max_tokens: {TOKENS}, max_patches: {4 * TOKENS}, pool_size: 64}}",
    "monitor.wandb=disabled",
]


@dataclass
class Setup:
    """What all ways share."""

    run: RunConfig
    stage: StageConfig
    model: ModelConfig
    tokenizer: TextTokenizer
    world: World
    monitor: Monitor

    def loader(self) -> PackLoader:
        return PackLoader(self.stage.data, self.tokenizer, RANKS, self.world.rank, self.world.size, self.run.seed)


class Plain:
    """DDP, clip, AdamW: what one would write without this project, on packs that are ready."""

    def __init__(self, setup: Setup, packs: list[PackedBatch]) -> None:
        self.setup, self.packs, self.wait_s = setup, packs, 0.0
        model = Qwen2VL(setup.model)
        initialise(model, setup.run.seed)
        optim = setup.stage.optim
        self.optimizer = build_optimizer(parameter_groups(model, optim, setup.model.vision.depth), optim)
        self.model: nn.Module = DistributedDataParallel(model)

    def step(self) -> None:
        pack = self.packs.pop(0)
        count = self.setup.world.sum(torch.tensor(float(pack.num_supervised)))
        (self.model(pack).loss_sum * self.setup.world.size / count).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.stage.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours:
    """The body of `Trainer._train`'s loop, but for saving, at one stage of ZeRO."""

    def __init__(self, setup: Setup, zero_stage: int, folder: Path, stop: StopRequest, watchdog: Watchdog) -> None:
        self.setup, self.stop, self.watchdog, self.wait_s = setup, stop, watchdog, 0.0
        config = replace(setup.run.engine, zero_stage=zero_stage)
        with building(config, setup.world):
            model = Qwen2VL(setup.model)
        initialise(model, setup.run.seed, rank=setup.world.rank)
        optim = setup.stage.optim
        groups = parameter_groups(model, optim, setup.model.vision.depth)
        self.engine = Engine(model, groups, optim, config, setup.world, 1)
        self.engine.train()
        self.loader = setup.loader()
        self.packs: Iterator[list[PackedBatch]] = iter(self.loader)
        self.journal = Journal(
            setup.stage,
            "multitask",
            folder,
            setup.model,
            self.loader.dataset_names,
            self.loader.shares,
            setup.world,
            setup.monitor,
        )
        self.ledger = Ledger(folder / f"ledger-zero{zero_stage}-rank{setup.world.rank}.jsonl")
        self.guard = Guard(setup.run.guard, folder, setup.world, setup.monitor.warn)
        self.spikes = SpikeGuard(setup.run.guard, folder, setup.world, setup.monitor.warn)
        self.feed = DeviceFeed(setup.world.device)
        self.progress = Progress()

    def step(self) -> None:
        journal, step = self.journal, self.progress.step + 1
        before = journal.window.wait_s
        self.watchdog.note(f"waiting for the packs of step {step}")
        packs = journal.window.timed_next(self.packs)
        self.wait_s += journal.window.wait_s - before
        self.engine.set_rates(rate_factor(self.progress.step, self.setup.stage.length, self.setup.stage.schedule))
        self.watchdog.note(f"counting the labels of step {step}")
        result = train_step(
            self.engine, packs, journal.totals, self.setup.world, self.stop.requested, self.watchdog.note_pack,
            self.feed,
        )  # fmt: skip
        journal.count(packs)
        self.ledger.add(packs)
        self.progress.step = step
        self.progress.trained_tokens += result.tokens
        self.watchdog.note(f"bookkeeping of step {step}")
        self.guard.check(result, packs, self.progress)
        self.spikes.judge(result, self.progress)
        if step % self.setup.run.monitor.log_every == 0:
            journal.log(self.engine, self.progress)


def prepare(folder: Path) -> Setup:
    torch.set_num_threads(1)
    run, settings = load_config([*SETTINGS, f"run_dir={folder / 'run'}", f"data.root={folder / 'data'}"])
    world = start_world(600)
    (folder / "run").mkdir(exist_ok=True)
    monitor = Monitor(folder / "run", run.monitor, settings, active=world.is_main)
    prepare_data(run, world, monitor)
    tokenizer = TextTokenizer(run.data.tokenizer)
    stage = run.stages["multitask"]
    sources = {name: stage.data.sources[name] for name in ("scenes", "text")}  # stills and text
    stage = replace(stage, data=replace(stage.data, sources=sources), packs_per_step=RANKS)
    return Setup(run, stage, model_config(run, tokenizer), tokenizer, world, monitor)


def compare(folder: Path, rounds: int, steps: int) -> None:
    """Worker: the comparison between two ends of the process group."""
    setup = prepare(folder)
    with StopRequest() as stop, Watchdog(setup.run.watchdog, setup.world, folder / "run") as watchdog:
        time_ways(setup, folder, rounds, steps, stop, watchdog)
    setup.world.barrier()
    end_world()


def time_ways(setup: Setup, folder: Path, rounds: int, steps: int, stop: StopRequest, watchdog: Watchdog) -> None:
    """Time the three ways in turns, then a checkpoint and its loading; rank 0 writes the figures."""
    loader = setup.loader()
    ready = iter(loader)
    packs = [next(ready)[0] for _ in range((rounds + 1) * steps)]
    tokens = statistics.mean(pack.num_tokens for pack in packs) * RANKS
    ways = {
        "ddp": Plain(setup, packs),
        "zero1": Ours(setup, 1, folder / "run", stop, watchdog),
        "zero3": Ours(setup, 3, folder / "run", stop, watchdog),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    waits: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            setup.world.barrier()
            way.wait_s, start = 0.0, time.perf_counter()
            for _ in range(steps):
                way.step()
            setup.world.barrier()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / steps)
                waits[name].append(way.wait_s / steps)
    ours = ways["zero3"]
    assert isinstance(ours, Ours)
    store = CheckpointStore(folder / "run" / "checkpoints", setup.run.checkpoint, setup.world, setup.monitor.warn)
    start = time.perf_counter()
    path = store.save(ours.engine, 1, {"loader": ours.loader.state_dict()})
    saved = time.perf_counter()
    assert path is not None
    found = store.find("auto")
    assert found == path
    store.load(ours.engine, path)
    loaded = time.perf_counter()
    if setup.world.is_main:
        median = {name: statistics.median(values) for name, values in seconds.items()}
        wait = {name: statistics.median(values) for name, values in waits.items()}
        figures = {
            "wrap_ratio": median["zero1"] / median["ddp"],
            "wrap_ratio_zero3": median["zero3"] / median["ddp"],
            "engine_ratio": (median["zero1"] - wait["zero1"]) / median["ddp"],
            "engine_ratio_zero3": (median["zero3"] - wait["zero3"]) / median["ddp"],
            "step_s": median,
            "wait_s": wait,
            "tokens_per_s": tokens / median["zero3"],
            "checkpoint_s": saved - start,
            "resume_s": loaded - saved,
        }
        (folder / "figures.json").write_text(json.dumps(figures))


def first_step(folder: Path) -> None:
    """Worker: build, load data, one step; rank 0 writes when it was done."""
    setup = prepare(folder)
    with StopRequest() as stop, Watchdog(setup.run.watchdog, setup.world, folder / "run") as watchdog:
        Ours(setup, 3, folder / "run", stop, watchdog).step()
    if setup.world.is_main:
        (folder / "first_step").write_text(repr(time.time()))
    setup.world.barrier()
    end_world()


def launch(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "-m", "benchmarks.step", *arguments], cwd=ROOT, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each way per round (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "step.json")
    parser.add_argument("--worker", choices=["compare", "first_step"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "compare":
        return compare(options.folder, options.rounds, options.steps)
    if options.worker == "first_step":
        return first_step(options.folder)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounds = ["--rounds", str(options.rounds), "--steps", str(options.steps)]
        launch("--worker", "compare", "--folder", name, *rounds)
        start = time.time()
        launch("--worker", "first_step", "--folder", name)  # the data is there by now
        figures = json.loads((folder / "figures.json").read_text())
        figures["start_s"] = float((folder / "first_step").read_text()) - start
    figures |= {"ranks": RANKS, "pack_tokens": TOKENS, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return None


if __name__ == "__main__":
    main()
