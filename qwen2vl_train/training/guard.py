"""The numerical guard: what happens when an update was left out because loss or gradients were not finite.

Enters: the result of each step. Leaves: a line per suspicious pack in `skipped_updates.jsonl`, counts in `Progress` (a
resumed run counts on), and an error past the configured limits. Costs nothing while updates are finite: the verdict is
the one that DeepSpeed needs anyhow, and the losses are looked at only after a skipped update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import GuardConfig
from qwen2vl_train.training.records import Record
from qwen2vl_train.training.step import StepResult
from qwen2vl_train.training.window import Progress
from qwen2vl_train.training.world import AgreedError, World


class NonFiniteError(AgreedError):
    """Too many updates were left out because loss or gradients were not finite."""


class Guard:
    """Counts skipped updates of one stage and names their packs in `folder`/skipped_updates.jsonl."""

    def __init__(self, config: GuardConfig, folder: Path, world: World, warn: Callable[[str], None]) -> None:
        self._config = config
        self._record = Record(folder / "skipped_updates.jsonl", warn)
        self._world = world

    def check(self, result: StepResult, packs: Sequence[PackedBatch], progress: Progress) -> None:
        """Take in the step that `progress.step` counts last. Collective after a skipped update, silent otherwise.

        Raises:
            NonFiniteError: the limit of skipped updates is reached, on every rank alike.
        """
        if not result.skipped:
            progress.skipped_in_row = 0
            return
        progress.skipped_in_row += 1
        progress.skipped_updates += 1
        losses = [float(loss) for loss in result.losses]
        mine = [_describe(pack, loss, self._world.rank) for pack, loss in zip(packs, losses, strict=True)]
        everyone = [row for rows in self._world.gather(mine) for row in rows]
        # without a bad loss the gradients broke on their own: every pack of the step is a suspect
        suspects = [row for row in everyone if row["loss"] is None] or everyone
        if self._world.is_main:
            self._record.add({"step": progress.step, **row} for row in suspects)
        in_row, in_all = progress.skipped_in_row, progress.skipped_updates
        if in_row >= self._config.max_skipped_in_row or in_all >= self._config.max_skipped:
            keys = [key for row in suspects for key in row["keys"]]
            raise NonFiniteError(
                f"step {progress.step}: loss or gradients were not finite, {in_row} times in a row and "
                f"{in_all} times in this stage (guard.max_skipped_in_row="
                f"{self._config.max_skipped_in_row}, guard.max_skipped={self._config.max_skipped}); no update was made "
                f"with them. Last packs {[row['pack'] for row in suspects]}, samples {', '.join(keys[:8])}"
                f"{', ...' if len(keys) > 8 else ''}; all are in {self._record.path}. Lower the learning rate, "
                "lengthen the warm-up, or drop the samples"
            )


def _describe(pack: PackedBatch, loss: float, rank: int) -> dict[str, Any]:
    """One pack of a skipped update; `loss` null means not finite."""
    return {
        "pack": pack.number,
        "rank": rank,
        "loss": loss if math.isfinite(loss) else None,
        "keys": list(pack.keys),
    }
