"""A pack in a slot of shared memory: written by a worker, read by the process that trains.

Enters: a `PackedBatch`. Leaves: the same on the other side of a fork, copied once each way; nothing goes through a pipe
but where it stands.
"""

from __future__ import annotations

import mmap
import pickle
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.samples import PackedBatch

_ALIGNMENT = 64


def write_batch(batch: PackedBatch, slot: mmap.mmap) -> tuple[int, int]:
    """Write the batch into `slot`: its tensors, then all else with the tensors' places, pickled; where that stands."""
    values: dict[str, Any] = {}
    end = 0
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            array = value.contiguous().numpy()
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + array.nbytes
            _check_room(batch.number, end, slot)
            np.frombuffer(slot, np.uint8, array.nbytes, start)[:] = array.reshape(-1).view(np.uint8)
            value = _Place(start, tuple(value.shape), value.dtype)
        values[field.name] = value
    data = pickle.dumps(values, pickle.HIGHEST_PROTOCOL)
    _check_room(batch.number, end + len(data), slot)
    slot[end : end + len(data)] = data
    return end, end + len(data)


def _check_room(number: int, end: int, slot: mmap.mmap) -> None:
    if end > len(slot):
        raise ValueError(f"pack {number} takes {end} bytes, its slot of shared memory has {len(slot)}")


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_batch(place: tuple[int, int], slot: mmap.mmap, pin_memory: bool) -> PackedBatch:
    """The batch that `write_batch` wrote, copied out of the slot (into page-locked memory on request)."""
    values = pickle.loads(slot[place[0] : place[1]])
    for name, value in values.items():
        if isinstance(value, _Place):
            tensor = torch.empty(value.shape, dtype=value.dtype, pin_memory=pin_memory)
            if tensor.numel():
                stored = torch.frombuffer(slot, dtype=value.dtype, count=tensor.numel(), offset=value.start)
                tensor.copy_(stored.view(value.shape))
            values[name] = tensor
    return PackedBatch(**values)


def packs_ahead(num_workers: int, prefetch_factor: int, prefetch_mb: int, slot_bytes: int) -> int:
    """How many packs are made ahead: `prefetch_factor` a worker, fewer where slots would take over `prefetch_mb` MiB.

    At least 1, whatever it takes: raise `prefetch_mb` where workers would idle.
    """
    return max(1, min(num_workers * prefetch_factor, (prefetch_mb << 20) // slot_bytes))


def slot_bytes(max_tokens: int, max_patches: int) -> int:
    """Bytes that the tensors of any pack within the budgets need.

    A patch row of a clip has 1176 bytes, its position 8, its share of the feature index 2; a token 8 + 8 + 24 bytes of
    ids, labels and positions, and up to 24 of loss index, target and data set; borders and grids are a few per item.
    """
    return max_patches * (1176 + 8 + 2 + 8) + max_tokens * (40 + 24 + 8 + 16) + (1 << 20)
