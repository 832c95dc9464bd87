"""One rank of the tests of engine and checkpoints without the loop around them: trains on hand-made packs and saves.

Usage (under torchrun): store_worker FOLDER/main/checkpoints OPTIONS.json   Keys of the options, all optional:
    zero_stage, precision, offload_optimizer, clip; whole: elements below which ZeRO-3 keeps a parameter on every rank
    steps: the step to train to, from the checkpoint that `resume` finds (default auto)
    trainable: the parts that train (default all)     seed: of the initial weights
    tiny: true adds a trained parameter of two elements in a group of its own: of two ranks one holds its padding alone
    every: a checkpoint each so many steps     rate, weight_decay, betas: of AdamW     out: file of losses and weights
    kill: {"rank": r, "step": s} ends that rank by SIGKILL while the others write the checkpoint of step s
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from qwen2vl_train.config import CheckpointConfig, EngineConfig, LearningRates, OptimConfig
from qwen2vl_train.model.head import LossOutput
from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.checkpoint import CheckpointStore
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.failure import exit_after
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.step import LossTotals, train_step
from qwen2vl_train.training.world import World, end_world, start_world
from tests.distributed.packs import CONFIG, uneven_packs

PACKS = 4


def build(world: World, options: dict) -> Engine:
    zero_stage, rate = options.get("zero_stage", 3), options.get("rate", 1e-3)
    whole = options.get("whole", 0)
    config = EngineConfig(
        zero_stage,
        options.get("precision", "fp32"),
        offload_optimizer=options.get("offload_optimizer", False),
        param_persistence_threshold=whole,
        prefetch_bucket_size=100_000,
        reduce_bucket_size=100_000,
    )
    with building(config, world):
        model = Qwen2VL(CONFIG)
    initialise(model, seed=options.get("seed", 1), rank=world.rank)
    freeze(model, options.get("trainable", ("vit", "merger", "llm")))
    decay, betas = options.get("weight_decay", 0.05), tuple(options.get("betas", (0.9, 0.98)))
    clip = options.get("clip", 0.5)
    optim = OptimConfig(LearningRates(rate, rate, rate), betas=betas, weight_decay=decay, clip_norm=clip)
    groups = parameter_groups(model, optim, CONFIG.vision.depth)
    if options.get("tiny"):
        groups.append(add_tiny_group(model, rate))
    return Engine(model, groups, optim, config, world, PACKS // world.size)


def add_tiny_group(model: Qwen2VL, rate: float) -> dict:
    """Two factors of the loss."""
    model.scale = torch.nn.Parameter(torch.ones(2))
    model.register_forward_hook(
        lambda module, _, output: LossOutput(output.loss_sum * module.scale.prod(), output.token_losses)
    )
    return {"params": [model.scale], "name": "tiny", "lr": rate, "peak_lr": rate, "weight_decay": 0.0}


def settings_of(engine: Engine) -> list[dict]:
    """The groups' settings."""
    groups = engine._engine.basic_optimizer.param_groups
    return [{key: group[key] for key in ("name", "peak_lr", "lr", "weight_decay", "betas", "eps")} for group in groups]


def updates_of(engine: Engine) -> list[int]:
    """How many updates each part of the optimizer's state has seen."""
    return [int(state["step"]) for state in engine._engine.basic_optimizer.state.values()]


def run(world: World, folder: Path, options: dict) -> None:
    engine = build(world, options)
    store = CheckpointStore(folder, CheckpointConfig(keep=9, min_free_gb=0), world, print)
    path = store.find(options.get("resume", "auto"))
    done = store.load(engine, path)["step"] if path is not None else 0
    settings, updates = settings_of(engine), updates_of(engine)
    clip = getattr(engine._optimizer, "clip_grad", None)  # stage 0: `Engine` clips
    engine.train()
    totals = LossTotals(2, world.device)
    losses = []
    for step in range(done + 1, options.get("steps", 4) + 1):
        engine.set_rates(1.0)
        train_step(engine, uneven_packs(PACKS, seed=step)[world.rank :: world.size], totals, world)
        sums, counts = totals.read(world)
        losses.append(sum(sums) / sum(counts))
        if step % options.get("every", 1) == 0:
            kill = options.get("kill", {})
            if (kill.get("rank"), kill.get("step")) == (world.rank, step):
                engine.save = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
            store.save(engine, step, {"stage": "main"})
    weights = dict(engine.full_tensors())
    if world.is_main and "out" in options:
        result = {"from": str(path), "settings": settings, "clip": clip, "updates": updates, "losses": losses}
        torch.save(result | {"weights": weights}, options["out"])
    engine.close()


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    world = start_world(60)
    try:
        run(world, folder, options)
    except Exception as error:
        exit_after(error, world)
    world.barrier()
    end_world()


if __name__ == "__main__":
    main()
