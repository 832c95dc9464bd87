"""One rank of a distributed test: trains on hand-made packs, writes what rank 0 saw and prints what is left at the end.

Usage (under torchrun): train_worker.py OUT.pt ZERO_STAGE TRAINABLE(comma separated) STEPS PACKS_PER_STEP
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from qwen2vl_train.config import EngineConfig, LearningRates, OptimConfig
from qwen2vl_train.model.language import DecoderLayer
from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.vision import VisionBlock
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.step import LossTotals, train_step
from qwen2vl_train.training.world import World, end_world, start_world
from tests.distributed.packs import CONFIG, uneven_packs


def train(world: World, out: str, zero_stage: str, trainable: str, steps: str, packs_per_step: str) -> None:
    config = EngineConfig(int(zero_stage), "fp32", param_persistence_threshold=0, prefetch_bucket_size=100_000)
    with building(config, world):
        model = Qwen2VL(CONFIG)
    initialise(model, seed=1, rank=world.rank)
    freeze(model, trainable.split(","))
    optim = OptimConfig(LearningRates(1e-3, 1e-3, 1e-3), clip_norm=0.5)
    groups = parameter_groups(model, optim, CONFIG.vision.depth)
    batch = int(packs_per_step)
    engine = Engine(model, groups, optim, config, world, batch // world.size)
    engine.train()
    totals = LossTotals(2, world.device)
    losses, norms = [], []
    for step in range(int(steps)):
        packs = uneven_packs(batch, seed=step)
        train_step(engine, packs[world.rank :: world.size], totals, world)
        sums, counts = totals.read(world)
        losses.append([total / count for total, count in zip(sums, counts, strict=True)])
        norms.append(engine.gradient_norm())
    weights = dict(engine.full_tensors())
    if world.is_main:
        torch.save({"losses": losses, "norms": norms, "weights": weights}, out)
    engine.close()


def left_behind() -> list[str]:
    """Model parts that are still in memory, and threads of the process group that still run."""
    modules = [type(item).__name__ for item in gc.get_objects() if type(item) in (Qwen2VL, DecoderLayer, VisionBlock)]
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return modules + [thread for thread in threads if "gloo" in thread]


def main() -> None:
    torch.set_num_threads(1)
    world = start_world(60)
    train(world, *sys.argv[1:])
    world.barrier()
    end_world()
    sys.stdout.write(f"left behind: {left_behind()}\n")  # one write: ranks share the output


main()
