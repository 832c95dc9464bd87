"""What is logged: the figures of a window of steps, summed over all ranks, and the samples' error budget.

Enters: a step's packs and losses as they come (`window`, `totals`). Leaves: a line of metrics per log, folded into the
stage's `Progress`. A log is the loop's only host synchronisation besides DeepSpeed's own, and its only gathering.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import StageConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import PackLengths, model_flops_utilisation, pack_flops, peak_flops_per_second
from qwen2vl_train.training.engine import Engine
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.step import LossTotals
from qwen2vl_train.training.window import Progress, Window, slowest_wait_s
from qwen2vl_train.training.world import AgreedError, World


class ErrorBudgetError(AgreedError):
    """A dataset lost more samples than its configuration allows."""


class Journal:
    """Counts between logs (`window`, `totals`) and writes them."""

    def __init__(
        self,
        stage: StageConfig,
        name: str,
        folder: Path,
        model: ModelConfig,
        dataset_names: Sequence[str],
        wanted: Callable[[int], Mapping[str, float]],
        world: World,
        monitor: Monitor,
    ) -> None:
        """`wanted` tells each dataset's share of the samples after so many tokens of training."""
        self._stage, self._name, self._folder, self._model = stage, name, folder, model
        self._dataset_names = tuple(dataset_names)
        self._wanted, self._world, self._monitor = wanted, world, monitor
        self.totals = LossTotals(len(self._dataset_names), world.device)
        self.window = Window(self._dataset_names)

    def count(self, packs: Sequence[PackedBatch]) -> None:
        """Count one step's packs of this rank (in host memory)."""
        trainable = self._stage.trainable
        flops = sum(pack_flops(self._model, PackLengths.of(pack), trainable).total for pack in packs)
        self.window.count(packs, flops)

    def log(self, engine: Engine, progress: Progress) -> None:
        """Fold the window into `progress`, report it, start the next. Collective; nothing if no step was counted.

        Raises:
            ErrorBudgetError: a dataset lost too many of its samples, on every rank alike.
        """
        window = self.window
        if not window.steps:
            return
        sums, counts = self.totals.read(self._world)
        window.memory_bytes = _peak_memory(self._world.device)
        windows = self._world.gather(window)
        seconds = window.seconds()
        loss = sum(sums) / sum(counts) if sum(counts) else None
        wanted = self._wanted(progress.tokens)
        progress.fold(windows, seconds, int(sum(counts)), loss)
        tokens, vision, capacity = (
            sum(getattr(part, name) for part in windows) for name in ("tokens", "vision_tokens", "capacity")
        )
        metrics: dict[str, Any] = {
            "gradient_norm": engine.gradient_norm(),
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised,
            "tokens_per_s": tokens / seconds,
            "samples_per_s": sum(part.documents.total() for part in windows) / seconds,
            "tflops_per_s": sum(part.flops for part in windows) / seconds / 1e12,
            "memory_gb": max(part.memory_bytes for part in windows) / 1e9,
            "step_s": seconds / window.steps,
            "data_wait_share": slowest_wait_s(windows) / seconds,
            "fill": tokens / max(1, capacity),
            "vision_share": vision / max(1, tokens),
            "skipped": sum(progress.lost.values()),
            "skipped_updates": progress.skipped_updates,
            "rollbacks": progress.rollbacks,
        }
        peak = peak_flops_per_second(self._world.device, engine.dtype)
        if peak is not None:  # of all ranks together, waiting for data included
            flops = sum(part.flops for part in windows)
            metrics["mfu"] = model_flops_utilisation(flops, seconds, peak * self._world.size)
        if loss is not None:
            metrics = {"loss": loss} | metrics
        metrics |= {f"lr/{name}": rate for name, rate in engine.rates().items()}
        named = zip(self._dataset_names, sums, counts, strict=True)
        metrics |= {f"loss/{name}": total / count for name, total, count in named if count}
        metrics |= _mixture(windows, wanted)
        metrics |= {f"documents/{name}": count for name, count in progress.documents.items()}
        metrics |= {f"skipped/{name}": count for name, count in progress.lost.items()}
        self._monitor.log(self._name, progress.step, metrics)
        shown = "no labels" if loss is None else f"loss {loss:.3f}"
        speed = f"{metrics['tokens_per_s']:,.0f} tok/s  data wait {metrics['data_wait_share']:.0%}"
        self._monitor.advance(progress.position(self._stage), f"{shown}  {speed}")
        self._check_losses_of_samples(progress)
        window.reset()

    def discard(self) -> None:
        """Forget the steps since the last log: they are undone."""
        self.totals.clear()
        self.window.reset()

    def _check_losses_of_samples(self, progress: Progress) -> None:
        """Stop when a dataset loses more of its samples than its `max_error_rate` (from 100 samples on).

        What the index left out was held against the same rate when the data was opened. Every rank holds the same
        counts here, so all stop together.
        """
        for name, source in self._stage.data.sources.items():
            lost = progress.failed.get(name, 0)
            seen = lost + progress.documents.get(name, 0)
            if seen >= 100 and lost > source.max_error_rate * seen:
                reasons = ", ".join(f"{label}: {count}" for label, count in sorted(progress.lost.items()))
                raise ErrorBudgetError(
                    f"dataset {name} lost {lost} of {seen} samples, over its max_error_rate {source.max_error_rate} "
                    f"({reasons}); {self._folder}/ledger-rank*.jsonl names each one. Repair or drop them, or raise "
                    f"mixture.{self._name}.{name}.max_error_rate"
                )


def _mixture(windows: Sequence[Window], wanted: Mapping[str, float]) -> dict[str, float]:
    """Each dataset's share of the windows' samples beside the share that its weight asks for."""
    documents = sum((window.documents for window in windows), Counter[str]())
    total = documents.total()
    shares = {name: documents[name] / total for name in wanted} if total else {}
    return {f"mixture/{name}": share for name, share in shares.items()} | {
        f"mixture/{name}.wanted": wanted[name] for name in shares
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on the GPU since the last call, or what this process holds now on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
