"""One rank of a distributed test: trains on hand-made packs and writes what rank 0 saw.

Usage (under torchrun): train_worker.py OUT.pt ZERO_STAGE TRAINABLE(comma separated) STEPS PACKS_PER_STEP
"""

from __future__ import annotations

import sys

import torch

from qwen2vl_train.config import EngineConfig, LearningRates, OptimConfig
from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.step import LossTotals, train_step
from qwen2vl_train.training.world import end_world, start_world
from tests.distributed.packs import CONFIG, uneven_packs


def main() -> None:
    out, zero_stage, trainable, steps, packs_per_step = sys.argv[1:]
    torch.set_num_threads(1)
    world = start_world(60)
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
    world.barrier()
    end_world()


main()
