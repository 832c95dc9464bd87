"""One optimizer step over this rank's packs: count, forward/backward, clip and update.

The loss of a step is the sum over supervised tokens of the whole global batch (all ranks, all micro-steps) divided by
their count, so the gradient is that of one process holding every pack. The only host synchronisation here is
DeepSpeed's own: whether the update's gradient norm is finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.samples import PackedBatch
from qwen2vl_train.training.ahead import DeviceFeed
from qwen2vl_train.training.engine import Engine
from qwen2vl_train.training.world import World


class LossTotals:
    """Running loss sums and supervised-token counts per dataset of this rank, on the device until they are read."""

    def __init__(self, num_datasets: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, num_datasets, dtype=torch.float64, device=device)

    def add(self, token_losses: Tensor, datasets: Tensor) -> None:
        """Add each supervised token's loss [L] to its dataset's total; `datasets` int64 [L].

        A loss that is not finite is left out (its update is skipped, too): one of them would hide all others' mean.
        """
        finite = token_losses.isfinite()
        self._sums[0].index_add_(0, datasets, torch.where(finite, token_losses, 0.0).double())
        self._sums[1].index_add_(0, datasets, finite.double())

    def read(self, world: World) -> tuple[list[float], list[float]]:
        """(loss sums, token counts) per dataset over all ranks since the last read. Collective; synchronises."""
        total = world.sum(self._sums.clone())
        self._sums.zero_()
        sums, counts = total.tolist()
        return sums, counts

    def clear(self) -> None:
        """Forget what was added since the last read."""
        self._sums.zero_()


@dataclass(frozen=True)
class StepResult:
    """What a step tells the host; the same on every rank but for `losses`.

    `skipped`: the update was left out, its gradient norm was not finite. `stop`: some rank asked to stop after it.
    `supervised` and `tokens` of the global batch. `losses` [micro-steps] are this rank's summed losses by pack, on the
    device.
    """

    skipped: bool
    stop: bool
    supervised: int
    tokens: int
    losses: Tensor


def train_step(
    engine: Engine,
    packs: Sequence[PackedBatch],
    totals: LossTotals,
    world: World,
    stop: bool = False,
    note: Callable[[str, PackedBatch], None] | None = None,
    feed: DeviceFeed | None = None,
) -> StepResult:
    """Run `packs` (this rank's micro-steps of the step) forward and backward and update the parameters. Collective.

    A loss that is not finite makes its own gradient NaN, on the device, so that the norm over all ranks tells every
    rank to skip: a loss can be infinite while its gradient still looks healthy. `stop` travels with the label count, so
    that ranks that were signalled at different moments stop after the same step. `note` is told what happens to which
    pack. `feed` brings the packs to the device (its copies start first of all).
    """
    batches = (feed or DeviceFeed(engine.device)).batches(packs)
    own = (sum(pack.num_supervised for pack in packs), sum(pack.num_tokens for pack in packs), int(stop))
    header = to_device(own, engine.device)
    world.sum(header)  # now the global batch's supervised tokens and tokens, and how many ranks ask to stop
    totals_of_step = _to_host(header)
    scale = (world.size / header[0].clamp(min=1.0)).float()  # DeepSpeed averages over ranks: undo it
    losses = []
    for pack, batch in batches:
        if note is not None:
            note("forward and backward", pack)
        output = engine(batch)
        loss = output.loss_sum
        engine.backward(loss * torch.where(loss.detach().isfinite(), scale, float("nan")))
        totals.add(output.token_losses, batch.loss_datasets)
        losses.append(loss.detach())
        engine.step()
    supervised, tokens, stops = map(int, totals_of_step())
    return StepResult(engine.skipped, stops > 0, supervised, tokens, torch.stack(losses))


def to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """`values` as float64 on `device`; the host does not wait for the copy.

    It would from ordinary memory. Torch gives the pinned memory to nobody else before the copy is done.
    """
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Callable[[], list[float]]:
    """Start a copy to the host; call the result for the values once they are needed.

    On CUDA the copy is long done then: the update has waited for the gradient norm, which comes after it.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
