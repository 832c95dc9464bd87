"""Loss spikes: a step whose loss lies far over the last ones sends the stage back to a checkpoint, past the packs.

Enters: each step's result, if `guard.spike_sigma` is set. Leaves: a verdict, the same on every rank, before that step's
checkpoint can be written; the last losses in `Progress`, so that a resumed run judges alike; a line per spike in
`spikes.jsonl`. Costs one all-reduce of a number per step, after the synchronisation that the update makes anyhow.

Going back takes model and optimizer from the checkpoint and leaves the loader where it is: training goes on from the
checkpoint's step with the packs that follow the spike. Those between (the checkpoint's next step to the spike) are not
trained again. The next checkpoint holds that state of the loader; a run killed before it meets the same spike again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import GuardConfig
from qwen2vl_train.training.records import Record
from qwen2vl_train.training.step import StepResult
from qwen2vl_train.training.window import Progress
from qwen2vl_train.training.world import AgreedError, World

_LEAST_SPREAD = 0.01  # of the mean: on a plateau, the deviation alone would call every breath of the data a spike


class SpikeError(AgreedError):
    """The loss jumped more often than the configuration allows."""


@dataclass(frozen=True)
class Spike:
    """A step's loss (mean over its supervised tokens) against the mean and deviation of those before it."""

    step: int
    loss: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"step {self.step}: the loss jumped to {self.loss:.4g} from {self.mean:.4g} ± {self.deviation:.2g}"


class SpikeGuard:
    """Judges each step's loss; off without `guard.spike_sigma`."""

    def __init__(self, config: GuardConfig, folder: Path, world: World, warn: Callable[[str], None]) -> None:
        self._config = config
        self._record = Record(folder / "spikes.jsonl", warn)
        self._world = world

    def judge(self, result: StepResult, progress: Progress) -> Spike | None:
        """The spike that the step counted last in `progress` is, or None and its loss is remembered. Collective.

        Steps without a finite loss or any label are passed over (`Guard` handles the first).
        """
        if not self._config.spike_sigma:
            return None
        total = self._world.sum(result.losses.sum(dtype=torch.float64))  # every rank holds the global batch's loss
        loss = float(total) / max(1, result.supervised)
        if result.skipped or not result.supervised or not math.isfinite(loss):
            return None
        spike = find_spike(progress.step, loss, progress.recent_losses, self._config)
        if spike is None:
            self.remember(loss, progress)
        return spike

    def remember(self, loss: float, progress: Progress) -> None:
        """Count `loss` among those that the next ones are held against."""
        progress.recent_losses = [*progress.recent_losses, loss][-self._config.spike_window :]

    def record(self, spike: Spike, packs: Sequence[PackedBatch], returned_to: int | None, rollbacks: int) -> None:
        """Write down `spike` with the packs of its step, going back to step `returned_to` (None: not). Collective.

        Raises:
            SpikeError: `rollbacks` is over the limit, on every rank alike.
        """
        rows = self._world.gather([{"pack": pack.number, "keys": list(pack.keys)} for pack in packs])
        by_pack = {row["pack"]: row for rank_rows in rows for row in rank_rows}  # ranks may share one
        line = {**vars(spike), "returned_to": returned_to, "rollbacks": rollbacks, "packs": list(by_pack.values())}
        if self._world.is_main:
            self._record.add([line])
        if rollbacks > self._config.max_rollbacks:
            raise SpikeError(
                f"{spike}, after {rollbacks - 1} rollbacks (guard.max_rollbacks={self._config.max_rollbacks}). "
                f"{self._record.path} names the packs and samples of each spike. Lower the learning rate, drop the "
                "samples, go further back with resume=<an older checkpoint>, or raise guard.spike_sigma if these are "
                "none"
            )


def find_spike(step: int, loss: float, before: Sequence[float], config: GuardConfig) -> Spike | None:
    """Whether `loss` is a spike after the losses `before`; never with less than half a window of them.

    >>> find_spike(5, 3.2, [2.0, 2.2, 2.0, 2.2], GuardConfig(spike_sigma=6, spike_window=8))
    Spike(step=5, loss=3.2, mean=2.1, deviation=0.1)
    """
    if 2 * len(before) < config.spike_window:
        return None
    mean = statistics.fmean(before)
    deviation = statistics.pstdev(before, mean)
    limit = mean + config.spike_sigma * max(deviation, _LEAST_SPREAD * abs(mean))
    return Spike(step, loss, round(mean, 6), round(deviation, 6)) if loss > limit else None
