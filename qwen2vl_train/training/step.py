"""One optimizer step over this rank's packs: count, forward/backward, clip and update.

The loss of a step is the sum over supervised tokens of the whole global batch (all ranks, all micro-steps) divided by
their count, so the gradient is that of one process holding every pack. No host synchronisation happens here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.samples import PackedBatch
from qwen2vl_train.training.engine import Engine
from qwen2vl_train.training.world import World


class LossTotals:
    """Running loss sums and supervised-token counts per dataset of this rank, on the device until they are read."""

    def __init__(self, num_datasets: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, num_datasets, dtype=torch.float64, device=device)

    def add(self, token_losses: Tensor, datasets: Tensor) -> None:
        """Add each supervised token's loss [L] to its dataset's total; `datasets` int64 [L]."""
        self._sums[0].index_add_(0, datasets, token_losses.double())
        self._sums[1].index_add_(0, datasets, torch.ones_like(token_losses, dtype=torch.float64))

    def read(self, world: World) -> tuple[list[float], list[float]]:
        """(loss sums, token counts) per dataset over all ranks since the last read. Collective; synchronises."""
        total = world.sum(self._sums.clone())
        self._sums.zero_()
        sums, counts = total.tolist()
        return sums, counts


def train_step(engine: Engine, packs: Sequence[PackedBatch], totals: LossTotals, world: World) -> None:
    """Run `packs` (this rank's micro-steps of the step) forward and backward and update the parameters. Collective."""
    count = torch.tensor(float(sum(pack.num_supervised for pack in packs)), device=engine.device)
    world.sum(count)  # every rank holds the number of supervised tokens of the global batch
    scale = world.size / count.clamp(min=1.0)  # DeepSpeed averages over ranks: undo it
    for pack in packs:
        batch = pack.to(engine.device)
        output = engine(batch)
        engine.backward(output.loss_sum * scale)
        totals.add(output.token_losses, batch.loss_datasets)
        engine.step()
