"""One stage of training: build, resume, loop, leave an export behind.

Enters: a validated configuration, the stage's name and the weights to start from. Leaves: a Hugging Face folder and the
stage's figures. The loop is `Trainer.fit`; everything it calls per step is in `step.py`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import ConfigError, RunConfig, StageConfig
from qwen2vl_train.export import export_model
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.parts import audit, format_audit, freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise, load_hf
from qwen2vl_train.training.checkpoint import CheckpointStore
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.schedule import rate_factor
from qwen2vl_train.training.step import LossTotals, train_step
from qwen2vl_train.training.window import Progress, Window
from qwen2vl_train.training.world import World


class ErrorBudgetError(ValueError):
    """A dataset lost more samples than its configuration allows."""


class Trainer:
    """Trains `stage_name` from the weights in `init` (a folder, or None for seeded random weights)."""

    def __init__(
        self,
        run: RunConfig,
        stage_name: str,
        init: Path | None,
        model_config: ModelConfig,
        world: World,
        monitor: Monitor,
    ) -> None:
        self._run = run
        self._name = stage_name
        self._stage: StageConfig = run.stages[stage_name]
        self._init = init
        self._model_config = model_config
        self._world = world
        self._monitor = monitor
        self._folder = Path(run.run_dir) / stage_name
        self._tokenizer = TextTokenizer(run.data.tokenizer)
        if self._stage.packs_per_step % world.size:
            raise ConfigError(
                f"stages.{stage_name}.packs_per_step={self._stage.packs_per_step} is not a multiple of the world size "
                f"{world.size}: each rank takes the same number of packs; choose a multiple, or another number of ranks"
            )
        self._accumulation = self._stage.packs_per_step // world.size

    def fit(self) -> Progress:
        """Train to the stage's last step, resuming where the newest checkpoint left, and export. Collective."""
        stage, run = self._stage, self._run
        engine = self._build_engine()
        loader = PackLoader(
            stage.data, self._tokenizer, stage.packs_per_step, self._world.rank, self._world.size, run.seed,
            pin_memory=self._world.device.type == "cuda",
        )  # fmt: skip
        store = CheckpointStore(self._folder / "checkpoints", run.checkpoint.keep, self._world)
        progress = self._resume(store, engine, loader)
        ledger = Ledger(self._folder / f"ledger-rank{self._world.rank}.jsonl")
        totals = LossTotals(len(loader.dataset_names), self._world.device)
        window = Window(loader.dataset_names)
        engine.train()
        self._monitor.start_progress(f"{self._name:>10}", stage.steps, progress.step)
        packs_of_steps = iter(loader)
        for step in range(progress.step, stage.steps):
            packs = window.timed_next(packs_of_steps)
            engine.set_rates(rate_factor(step, stage.steps, stage.schedule))
            train_step(engine, packs, totals, self._world)
            window.count(packs)
            ledger.add(packs)
            progress.step = step + 1
            if progress.step % run.monitor.log_every == 0 or progress.step in (1, stage.steps):
                self._log(engine, loader, totals, window, progress)
            every = run.checkpoint.every
            if progress.step < stage.steps and every and progress.step % every == 0:
                if window.steps:  # figures up to here belong into the checkpoint
                    self._log(engine, loader, totals, window, progress)
                store.save(engine, progress.step, {"progress": asdict(progress), "loader": loader.state_dict()})
        self._monitor.stop_progress()
        loader.close()
        if progress.step == stage.steps:
            export_model(
                engine.full_tensors(), self._model_config, self._tokenizer, stage.data.media,
                self._folder / "export", getattr(torch, run.export_dtype), self._world,
            )  # fmt: skip
        engine.close()
        return progress

    def _build_engine(self) -> Engine:
        """The model with its parts frozen by rule; under ZeRO-3 each rank makes and fills its own share only."""
        settings = self._run.model
        with building(self._run.engine, self._world):
            model = Qwen2VL(
                self._model_config, settings.attention, settings.vision_checkpointing, settings.text_checkpointing
            )
        if self._init is None:
            initialise(model, self._run.seed, rank=self._world.rank)
        else:
            load_hf(model, self._init, rank=self._world.rank)
        freeze(model, self._stage.trainable)
        self._monitor.console.print(format_audit(audit(model, self._stage.trainable)), style="dim", highlight=False)
        groups = parameter_groups(model, self._stage.optim, self._model_config.vision.depth)
        return Engine(model, groups, self._stage.optim, self._run.engine, self._world, self._accumulation)

    def _resume(self, store: CheckpointStore, engine: Engine, loader: PackLoader) -> Progress:
        path = store.find(self._run.resume)
        if path is None:
            self._monitor.forget_after(self._name, -1)
            return Progress()
        state = store.load(engine, path)
        loader.load_state_dict(state["loader"])
        progress = Progress(**state["progress"])
        self._monitor.forget_after(self._name, progress.step)
        self._monitor.console.print(f"  resumed from {path} after step {progress.step}", highlight=False)
        return progress

    def _log(self, engine: Engine, loader: PackLoader, totals: LossTotals, window: Window, progress: Progress) -> None:
        """Fold the window into `progress` and report it. Collective: losses and counts are summed over ranks."""
        sums, counts = totals.read(self._world)
        windows = self._world.gather(window)
        seconds = window.seconds()
        loss = sum(sums) / max(1.0, sum(counts))
        progress.fold(windows, seconds, window.wait_s, int(sum(counts)), loss)
        tokens, vision, capacity = (
            sum(getattr(part, name) for part in windows) for name in ("tokens", "vision_tokens", "capacity")
        )
        metrics: dict[str, Any] = {
            "loss": loss,
            "gradient_norm": engine.gradient_norm(),
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds / window.steps,
            "data_wait_share": window.wait_s / seconds,
            "fill": tokens / max(1, capacity),
            "vision_share": vision / max(1, tokens),
            "skipped": sum(progress.lost.values()),
        }
        metrics |= {f"lr/{name}": rate for name, rate in engine.rates().items()}
        named = zip(loader.dataset_names, sums, counts, strict=True)
        metrics |= {f"loss/{name}": total / count for name, total, count in named if count}
        metrics |= {f"documents/{name}": count for name, count in progress.documents.items()}
        metrics |= {f"skipped/{name}": count for name, count in progress.lost.items()}
        self._monitor.log(self._name, progress.step, metrics)
        self._monitor.advance(progress.step, f"loss {loss:.3f}  {tokens / seconds:,.0f} tok/s")
        self._check_losses_of_samples(progress)
        window.reset()

    def _check_losses_of_samples(self, progress: Progress) -> None:
        """Stop when a dataset loses more of its samples than its `max_error_rate` (from 100 samples on).

        Every rank holds the same counts here, so all stop together.
        """
        for name, source in self._stage.data.sources.items():
            lost = sum(count for label, count in progress.lost.items() if label.rpartition("/")[0] == name)
            seen = lost + progress.documents.get(name, 0)
            if seen >= 100 and lost > source.max_error_rate * seen:
                reasons = ", ".join(f"{label}: {count}" for label, count in sorted(progress.lost.items()))
                raise ErrorBudgetError(
                    f"dataset {name} lost {lost} of {seen} samples, over its max_error_rate {source.max_error_rate} "
                    f"({reasons}); {self._folder}/ledger-rank*.jsonl names each one. Repair or drop them, or raise "
                    f"mixture.{self._name}.{name}.max_error_rate"
                )
