"""Packs on their way to the device, one ahead of the one that is computed.

Enters: a step's packs in (pinned) host memory. Leaves: each with its copy on the device. On CUDA the copies run on a
stream of their own: the first one beside what is left of the update before, each other one beside the forward and
backward of the pack before it. One more pack lies on the device (40 MB at 16,384 tokens). On the CPU nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from data_pipelines.samples import PackedBatch

Started = TypeVar("Started")


class DeviceFeed:
    """Copies packs to `device`; made once, since a stream is not free."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def batches(self, packs: Sequence[PackedBatch]) -> Iterator[tuple[PackedBatch, PackedBatch]]:
        """(pack in host memory, the same on the device), in order; the first copy starts with the call."""
        return one_ahead(packs, self._start, self._arrived)

    def _start(self, pack: PackedBatch) -> PackedBatch:
        if self._stream is None:
            return pack.to(self._device)
        with torch.cuda.stream(self._stream):
            return pack.to(self._device)

    def _arrived(self, batch: PackedBatch) -> PackedBatch:
        """Let the computing stream wait for the copy, and keep its memory until that stream is done with it."""
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for field in fields(batch):
                if isinstance(value := getattr(batch, field.name), Tensor):
                    value.record_stream(computing)
        return batch


def one_ahead(
    packs: Sequence[PackedBatch], start: Callable[[PackedBatch], Started], arrived: Callable[[Started], PackedBatch]
) -> Iterator[tuple[PackedBatch, PackedBatch]]:
    """(pack, `arrived(start(pack))`) in order; pack n + 1 is started after n has arrived and before n is handed out.

    The first one is started at once. In that order, waiting for everything started is waiting for no more than n.
    """
    first = start(packs[0]) if packs else None

    def handed_out(started: Started | None) -> Iterator[tuple[PackedBatch, PackedBatch]]:
        for number, pack in enumerate(packs):
            assert started is not None
            here = arrived(started)
            started = start(packs[number + 1]) if number + 1 < len(packs) else None
            yield pack, here

    return handed_out(first)
