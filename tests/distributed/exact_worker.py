"""One rank of the exactness tests: trains every case of this world size and writes what rank 0 saw.

Usage (under torchrun): exact_worker.py OUT.pt PRECISION ZERO_STAGES ACCUMULATIONS   (lists separated by commas)
"""

from __future__ import annotations

import sys

import torch
from deepspeed.utils import safe_get_full_grad

from qwen2vl_train.config import EngineConfig, LearningRates, OptimConfig
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.step import LossTotals, train_step
from qwen2vl_train.training.world import World, end_world, start_world
from tests.distributed.packs import CONFIG, uneven_packs

OPTIM = OptimConfig(LearningRates(0.1, 0.1, 0.1), name="sgd", weight_decay=0.0, clip_norm=0.25)
STEPS = 5


class RecordingEngine(Engine):
    """Keeps the first update's full gradients, as they are before clipping."""

    gradients: dict[str, torch.Tensor] | None = None

    def step(self) -> None:
        if self.gradients is None and self._engine.is_gradient_accumulation_boundary():
            named = [(name, item) for name, item in self._engine.module.named_parameters() if item.requires_grad]
            self.gradients = {name: safe_get_full_grad(parameter).float().clone() for name, parameter in named}
        super().step()


def train(world: World, precision: str, zero_stage: int, accumulation: int, whole: int) -> dict:
    config = EngineConfig(
        zero_stage,
        precision,
        param_persistence_threshold=whole,
        prefetch_bucket_size=100_000,
        reduce_bucket_size=100_000,
    )
    with building(config, world):
        model = Qwen2VL(CONFIG)
    initialise(model, seed=1, rank=world.rank)
    engine = RecordingEngine(
        model, parameter_groups(model, OPTIM, CONFIG.vision.depth), OPTIM, config, world, accumulation
    )
    engine.train()
    totals = LossTotals(2, world.device)
    losses, norms = [], []
    for step in range(STEPS):
        packs = uneven_packs(world.size * accumulation, seed=step)
        result = train_step(engine, packs[world.rank :: world.size], totals, world)
        assert not result.skipped
        sums, counts = totals.read(world)
        losses.append([sum(sums) / sum(counts), *(total / max(1, n) for total, n in zip(sums, counts, strict=True))])
        norms.append(engine.gradient_norm())
    weights = dict(engine.full_tensors())
    engine.close()
    return {"losses": losses, "norms": norms, "gradients": engine.gradients, "weights": weights}


def thresholds(zero_stage: int, accumulation: int) -> tuple[int, ...]:
    """Elements below which a parameter stays whole: none do; once also as shipped, which is all of so small a model."""
    return (0, EngineConfig().param_persistence_threshold) if (zero_stage, accumulation) == (3, 2) else (0,)


def main() -> None:
    out, precision, zero_stages, accumulations = sys.argv[1:]
    torch.set_num_threads(1)
    world = start_world(60)
    results = {
        (zero_stage, accumulation, whole): train(world, precision, zero_stage, accumulation, whole)
        for zero_stage in map(int, zero_stages.split(","))
        for accumulation in map(int, accumulations.split(","))
        for whole in thresholds(zero_stage, accumulation)
    }
    if world.is_main:
        torch.save(results, out)
    world.barrier()
    end_world()


if __name__ == "__main__":
    main()
