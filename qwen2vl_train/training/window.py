"""Counts of a rank between two logs, and a stage's totals that they are folded into.

Enters: packs as they are trained. Leaves: `Window` (sent to every rank at a log) and `Progress` (saved with the
checkpoints).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.ledger import LOSSLESS
from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import StageConfig


@dataclass
class Progress:
    """What a stage has done so far, over all ranks; saved with each checkpoint.

    `capacity` is packs * max_tokens, so fill = tokens / capacity. `seconds` is training time with data wait
    (`wait_s` of it, the slowest rank's), without evaluation or checkpoints. `documents` counts by dataset, `lost` and
    `changed` by "dataset/reason"; `failed` by dataset: those of `lost` that failed when their pack was made.
    All but `step`, `trained_tokens` and what the guards keep (`skipped_updates`, `skipped_in_row` up to the last step,
    `rollbacks`, `recent_losses`) is counted at each log.
    """

    step: int = 0
    trained_tokens: int = 0
    packs: int = 0
    tokens: int = 0
    supervised: int = 0
    vision_tokens: int = 0
    capacity: int = 0
    skipped_updates: int = 0
    skipped_in_row: int = 0
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    wait_s: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    documents: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def position(self, stage: StageConfig) -> int:
        """How much of `stage.length` is done, in its unit."""
        return self.trained_tokens if stage.tokens else self.step

    def rolled_back(self, saved: dict[str, Any]) -> Progress:
        """The `saved` progress of an earlier step, with one more rollback.

        The guards' counts go on: packs passed over are not trained again, so nothing would count them again.
        """
        counts = {"skipped_updates": self.skipped_updates, "skipped_in_row": self.skipped_in_row}
        return Progress(**saved | counts | {"rollbacks": self.rollbacks + 1})

    @property
    def fill(self) -> float:
        return self.tokens / max(1, self.capacity)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def fold(self, windows: Sequence[Window], seconds: float, supervised: int, loss: float | None) -> None:
        """Add every rank's window; `seconds` is this rank's clock, `loss` None without any label."""
        for window in windows:
            self.packs += window.packs
            self.tokens += window.tokens
            self.vision_tokens += window.vision_tokens
            self.capacity += window.capacity
            for name in ("documents", "lost", "changed", "failed"):
                setattr(self, name, dict(Counter(getattr(self, name)) + getattr(window, name)))
        self.supervised += supervised
        self.seconds += seconds
        self.wait_s += slowest_wait_s(windows)
        self.loss_first = loss if self.loss_first is None else self.loss_first
        self.loss_last = self.loss_last if loss is None else loss


class Window:
    """One rank's counts since the last log, and its clock."""

    def __init__(self, dataset_names: Sequence[str]) -> None:
        self._names = tuple(dataset_names)
        self.reset()

    def reset(self) -> None:
        """Start a new window now."""
        self.steps = self.packs = self.tokens = self.vision_tokens = self.capacity = self.flops = 0
        self.memory_bytes = 0
        self.wait_s = 0.0
        self.documents: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()  # of `lost`, by dataset: what failed when its pack was made
        self._start = time.perf_counter()

    def timed_next(self, source: Iterator[list[PackedBatch]]) -> list[PackedBatch]:
        """The next step's packs; the time spent waiting for them is counted."""
        start = time.perf_counter()
        packs = next(source)
        self.wait_s += time.perf_counter() - start
        return packs

    def count(self, packs: Sequence[PackedBatch], flops: int) -> None:
        """Count one step's packs of this rank, which took the model `flops` operations."""
        self.steps += 1
        self.flops += flops
        for pack in packs:
            self.packs += 1
            self.tokens += pack.num_tokens
            self.vision_tokens += int(pack.vision_index.shape[0])
            self.capacity += pack.max_tokens
            self.documents.update(self._names[dataset] for dataset in pack.datasets)
            for event in pack.events:
                counter = self.changed if event.reason in LOSSLESS else self.lost
                counter[f"{event.dataset}/{event.reason}"] += event.num_samples
                self.failed[event.dataset] += counter is self.lost and not event.indexed

    def seconds(self) -> float:
        """Since the last reset."""
        return time.perf_counter() - self._start


def slowest_wait_s(windows: Sequence[Window]) -> float:
    """What a window lost to waiting for data: every rank waits for the one whose packs come last."""
    return max(window.wait_s for window in windows)
