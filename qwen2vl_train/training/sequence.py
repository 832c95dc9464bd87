"""Sequence parallelism: neighbouring ranks that share one pack, so that a long one fits (DeepSpeed Ulysses).

Enters: whole packs, read by the first rank of each group. Leaves: on each rank its slice, and the exchange of rows
through which the model's attention sees the whole pack. World = data-parallel ranks x ranks of a group.

DeepSpeed is told nothing of it: to its engine every rank is a data-parallel rank with a batch of its own. Each rank's
loss is the sum over its own tokens and the exchange hands gradients back to where the rows came from, so the sum over
all ranks is the pack's gradient, under every ZeRO stage, and the one factor world / global label count stays right.
DeepSpeed's `sequence_parallel_size` would change its divisor of the gradients, not in every stage alike (its issue
5248), and the data type that it reduces them in; its `DistributedAttention` wants slices of equal length and at least
as many key/value heads as ranks.

Costs, beside the exchanges: the packs' way from the reading rank to the others, through host memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_pipelines.pack.slice import PackSlice, slice_pack
from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import ConfigError
from qwen2vl_train.training.world import World


@dataclass(frozen=True)
class SequenceGroup:
    """The `size` neighbouring ranks that share packs, of which this is number `rank`; one of `data_size` such groups.

    `devices` joins the ranks' devices, `hosts` their processes. A group of one rank has neither: nothing travels.
    """

    size: int
    rank: int
    data_rank: int
    data_size: int
    pin_memory: bool
    devices: dist.ProcessGroup | None = None
    hosts: dist.ProcessGroup | None = None

    @classmethod
    def form(cls, world: World, size: int, num_heads: int, timeout_s: float) -> SequenceGroup:
        """Divide `world` into groups of `size`; `num_heads` are the decoder's attention heads. Collective.

        Raises:
            ConfigError: `size` does not divide the ranks or the heads.
        """
        if world.size % size or num_heads % size:
            common = math.gcd(world.size, num_heads)
            possible = [str(number) for number in range(1, common + 1) if common % number == 0]
            raise ConfigError(
                f"engine.sequence_parallel={size} must divide the {world.size} rank(s) and the model's {num_heads} "
                f"attention heads, which the ranks of a pack share out; choose {' or '.join(possible)}, or another "
                "number of ranks"
            )
        place = cls(size, world.rank % size, world.rank // size, world.size // size, world.device.type == "cuda")
        if size == 1:
            return place
        limit = timedelta(seconds=timeout_s)
        devices, _ = dist.new_subgroups(size, timeout=limit)  # type: ignore[no-untyped-call]
        hosts, _ = dist.new_subgroups(size, timeout=limit, backend="gloo")  # type: ignore[no-untyped-call]
        return replace(place, devices=devices, hosts=hosts)

    @property
    def reads(self) -> bool:
        """This rank reads the packs of its group. One alone, so that a sample lost to a deadline is lost to all."""
        return self.rank == 0

    def deal(self, packs: list[PackedBatch]) -> Sequence[PackedBatch]:
        """This rank's slices of the packs that the reading rank holds (the others pass none). Collective.

        In a group of one, the packs.
        """
        if self.size == 1:
            return packs
        by_rank = [list(slices) for slices in zip(*(slice_pack(pack, self.size) for pack in packs), strict=True)]
        received: list[Any] = [None]
        dist.scatter_object_list(received, by_rank if self.reads else None, group=self.hosts, group_src=0)
        slices: list[PackSlice] = received[0]
        return [part.pin_memory() for part in slices] if self.pin_memory else slices

    def close(self) -> None:
        """Leave the groups, so that the next stage can form its own. Collective."""
        for group in (self.devices, self.hosts):
            if group is not None:
                dist.destroy_process_group(group)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows to and from the ranks of the group, see `model.sharing.Exchange`. Collective, its gradient too."""
        received: Tensor = _Exchange.apply(rows, list(send), list(receive), self.devices)  # type: ignore[no-untyped-call]
        return received


class _Exchange(torch.autograd.Function):
    """All-to-all whose gradient is the all-to-all back (torch's own differentiable ones are deprecated or private)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.way_back = (receive, send, group)
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, *ctx.way_back), None, None, None


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
