"""One rank of the tests of the loop: the real `Trainer` on hand-made packs, with a fault where the test wants one.

Usage (under torchrun): trainer_worker RUN_DIR OPTIONS.json   Keys of the options, all optional:
    steps, packs, every, keep, keep_every, min_free_gb, resume, optimizer, zero_stage, precision, trainable, tied, clip
    whole: elements below which ZeRO-3 keeps a parameter on every rank (default 0)
    compile, asynchronous, sequence_parallel          write_delay_s: before a checkpoint's first file is written
    takes_bytes: what the engine says that a checkpoint takes
    tokenizer: a folder; with it the model is exported as by a run, `tensor_s` seconds for each tensor
    mix: true draws each pack's kinds at random       step_s: seconds that each step sleeps
    tokens: the stage's length in them, for steps     warmup_tokens, schedule
    bad_packs: {number: "loss" | "gradient" | "spike"}   guard, watchdog: fields of their configurations
    leave_out: numbers of steps (from 0) whose packs the loader passes over
    fault: {"kind": "data" | "forward" | "stop" | "term" | "raise", "rank": r, "step": s}
        or {"kind": "save" | "export", "rank": r}: that rank hangs there
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipelines.config import DataConfig, PlanConfig
from data_pipelines.pack.collate import collate
from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import (
    CheckpointConfig,
    DataSettings,
    EngineConfig,
    EvaluationConfig,
    GuardConfig,
    LearningRates,
    ModelSettings,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    WatchdogConfig,
)
from qwen2vl_train.model.head import LossOutput
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.training import trainer as trainer_module
from qwen2vl_train.training.checkpoint import CheckpointStore
from qwen2vl_train.training.engine import Engine
from qwen2vl_train.training.failure import exit_after
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.stopping import Preempted, StopRequest
from qwen2vl_train.training.trainer import Trainer
from qwen2vl_train.training.watchdog import Watchdog
from qwen2vl_train.training.world import World, end_world, start_world
from tests.distributed.packs import SPECIAL, document, model_config, uneven_packs

KINDS = ((), ("image",), ("video",), ("image", "video"), ("image", "image"))


def mixed_packs(count: int, step: int) -> list[PackedBatch]:
    """Packs of random kinds and lengths, one in ten without any sample, one in five without a label."""
    packs = []
    for slot in range(count):
        generator = torch.Generator().manual_seed(1000 * step + slot)
        draw = torch.rand(4, generator=generator).tolist()
        words = 1 + int(20 * draw[1])
        shape = (KINDS[int(draw[0] * len(KINDS))], words, 0 if draw[2] < 0.2 else max(1, int(words * draw[2])))
        documents = [] if draw[3] < 0.1 else [document(generator, *shape, dataset=slot % 2)]
        packs.append(collate(step * count + slot, documents, SPECIAL, max_tokens=256))
    return packs


class HandMadeLoader:
    """Stands in for PackLoader: step s has the same packs for any number of ranks."""

    options: dict

    def __init__(self, config, tokenizer, packs_per_step, rank, world, seed, pin_memory=False, cost=None) -> None:
        self.dataset_names = ("even", "odd")
        self._packs, self._rank, self._world, self._step = packs_per_step, rank, world, 0

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        while True:
            while self._step in self.options.get("leave_out", []):
                self._step += 1
            step = self._step
            if self.options.get("mix"):
                packs = mixed_packs(self._packs, step)
            else:
                packs = uneven_packs(self._packs, seed=step)
            for number, pack in enumerate(packs):
                pack.number = step * self._packs + number
                pack.keys = tuple(f"key-{pack.number}-{place}" for place in range(len(pack.keys)))
            time.sleep(self.options.get("step_s", 0))
            fault = self.options.get("fault", {})
            if fault.get("kind") == "data" and (fault["rank"], fault["step"]) == (self._rank, step):
                time.sleep(1000)
            self._step += 1
            yield packs[self._rank :: self._world]

    def under_way(self) -> list[str]:
        return [f"worker of rank {self._rank} at step {self._step}"]

    def shares(self, tokens: int) -> dict[str, float]:
        return {"even": 0.5, "odd": 0.5}

    def state_dict(self) -> dict:
        return {"step": self._step, "plan": {"number": self._step * self._packs}}

    def load_state_dict(self, state: dict, accept_changes: bool = False) -> list[str]:
        self._step = state["step"]
        return []

    def close(self) -> None:
        self._closed = True


def faulty_forward(options: dict, world: World, packs_per_step: int):
    bad = {int(number): kind for number, kind in options.get("bad_packs", {}).items()}
    fault = options.get("fault", {})
    plain = Qwen2VL.forward

    def forward(self, batch):
        here = fault and (fault["rank"], fault.get("step")) == (world.rank, batch.number // packs_per_step)
        if here and fault["kind"] == "forward":
            time.sleep(1000)
        if here and fault["kind"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if here and fault["kind"] == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if here and fault["kind"] == "raise":
            raise RuntimeError(f"the cause lies in pack {batch.number}")
        output = plain(self, batch)
        kind = bad.get(batch.number)
        if kind == "loss":
            return LossOutput(output.loss_sum + float("inf"), output.token_losses + float("nan"))
        if kind == "spike":
            return LossOutput(output.loss_sum * 9, output.token_losses * 9)
        if kind == "gradient":
            output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return output

    return forward


def configure(run_dir: Path, options: dict) -> RunConfig:
    trainable = tuple(options.get("trainable", "vit,merger,llm").split(","))
    optim = OptimConfig(LearningRates(1e-3, 1e-3, 1e-3), options.get("optimizer", "adamw"), clip_norm=0.5)
    stage = StageConfig(
        trainable=trainable,
        steps=0 if "tokens" in options else options.get("steps", 6),
        tokens=options.get("tokens", 0),
        packs_per_step=options.get("packs", 4),
        optim=optim,
        data=DataConfig(sources={}, plan=PlanConfig(max_tokens=256)),
        schedule=ScheduleConfig(options.get("schedule", "constant"), warmup_tokens=options.get("warmup_tokens", 0)),
        init_from="scratch",
    )
    engine = EngineConfig(
        options.get("zero_stage", 3),
        options.get("precision", "fp32"),
        offload_optimizer=options.get("offload_optimizer", False),
        offload_parameters=options.get("offload_parameters", False),
        param_persistence_threshold=options.get("whole", 0),
        prefetch_bucket_size=100_000,
        reduce_bucket_size=100_000,
        timeout_s=120,
        sequence_parallel=options.get("sequence_parallel", 1),
    )
    return RunConfig(
        run_dir=str(run_dir),
        seed=1,
        chain=("main",),
        stages={"main": stage},
        model=ModelSettings(model_config(options.get("tied", True)), compile=options.get("compile", "none")),
        data=DataSettings("", options.get("tokenizer", "")),
        engine=engine,
        checkpoint=CheckpointConfig(
            options.get("every", 0),
            options.get("keep", 2),
            options.get("keep_every", 0),
            options.get("min_free_gb", 0),
            options.get("asynchronous", False),
        ),
        monitor=MonitorConfig("disabled", log_every=1),
        evaluation=EvaluationConfig(),
        guard=GuardConfig(**options.get("guard", {})),
        watchdog=WatchdogConfig(**{"stall_s": 60, "save_s": 100} | options.get("watchdog", {})),
        resume=options.get("resume", "auto"),
    )


def slowly(tensors, pause_s: float):
    """Each of `tensors`, after a pause."""
    for tensor in tensors:
        time.sleep(pause_s)
        yield tensor


def main() -> int:
    run_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    run = configure(run_dir, options)
    world = start_world(run.engine.timeout_s)
    HandMadeLoader.options = options
    trainer_module.PackLoader = HandMadeLoader
    if "tokenizer" not in options:
        trainer_module.TextTokenizer = lambda path: None
    Qwen2VL.forward = faulty_forward(options, world, run.stages["main"].packs_per_step)

    if "takes_bytes" in options:
        Engine.checkpoint_bytes = lambda engine: options["takes_bytes"]
    if "write_delay_s" in options:
        plain = CheckpointStore._write_mine

        def write_late(store, aside, writes):
            time.sleep(options["write_delay_s"])
            return plain(store, aside, writes)

        CheckpointStore._write_mine = write_late

    fault = options.get("fault", {})
    hangs = fault["kind"] if fault.get("rank") == world.rank else ""
    if hangs == "save":
        CheckpointStore._summarise_mine = lambda store, aside: time.sleep(1000)

    export_model = trainer_module.export_model

    def export(tensors, *arguments) -> None:
        time.sleep(1000 if hangs == "export" else 0)
        if "tokenizer" in options:
            export_model(slowly(tensors, options["tensor_s"]), *arguments)
            return
        weights = dict(tensors)
        if world.is_main:
            torch.save(weights, run_dir / "weights.pt")
        world.barrier()

    trainer_module.export_model = export
    run_dir.mkdir(parents=True, exist_ok=True)
    monitor = Monitor(run_dir, run.monitor, {}, active=world.is_main)
    init = Path(options["init"]) if "init" in options else None
    code = 0
    try:
        with StopRequest() as stop, Watchdog(run.watchdog, world, run_dir) as watchdog:
            Trainer(run, "main", init, run.model.config, world, monitor, run.resume).fit(stop, watchdog)
    except Preempted as order:
        print(order, file=sys.stderr)
        code = order.code
    except Exception as error:
        exit_after(error, world)
    world.barrier()
    end_world()
    return code


if __name__ == "__main__":
    sys.exit(main())
