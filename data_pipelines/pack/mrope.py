"""M-RoPE position ids of packed documents (Qwen2-VL paper, section 2.1, "Multimodal Rotary Position Embedding").

Enters: token ids with media as runs of their pad token, and the patch grid of each run. Leaves: int64 [3, T], the
(t, h, w) position of every token. Costs a few numpy passes over T, no loop over tokens or documents.

Rule: a text token has t = h = w = the next free position. A media item of grid (T, H, W) patches that begins at
position p gives its token (k, i, j) of the 2 x 2-merged grid the position (p + k, p + i, p + j); the text after it
goes on at p + max(T, H/2, W/2), one more than the largest position used. Positions restart at 0 in each document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.samples import MERGE_SIZE

IntArray = npt.NDArray[np.int64]


def position_ids(
    input_ids: Tensor,
    grids: Sequence[tuple[int, int, int]],
    image_pad: int,
    video_pad: int,
    cu_seqlens: Tensor | None = None,
    one_dimensional: bool = False,
) -> Tensor:
    """The M-RoPE positions, int64 [3, T], of `input_ids` int64 [T].

    `grids` are (t, h, w) in patches, one per media item in order of appearance. `cu_seqlens` [D + 1] are document
    borders (None: one document). `one_dimensional` counts every token instead, the ablation of the paper's table 8.

    Example: [x, <start>, image of grid (1, 4, 6), <end>, x] gives t = 0 1 222222 5 6, h = 0 1 222333 5 6,
    w = 0 1 234234 5 6: the image is 2 x 3 tokens large, so the text goes on at 2 + max(1, 2, 3) = 5.

    Raises:
        ValueError: the pad tokens do not match the grids: features would land on the wrong tokens.
    """
    ids = np.asarray(input_ids.numpy(), np.int64)
    starts, sizes, merged = _media_runs(ids, grids, image_pad, video_pad)
    borders = np.asarray([0, len(ids)], np.int64) if cu_seqlens is None else cu_seqlens.numpy().astype(np.int64)
    flat = np.arange(len(ids), dtype=np.int64)
    if not one_dimensional:
        # A media item of n tokens advances the position by its largest side only: all that follows moves back.
        flat = flat - _shift_before(len(ids), starts, sizes, merged)
    positions = np.broadcast_to(flat, (3, len(ids))).copy()
    if len(starts) and not one_dimensional:
        rows = np.repeat(starts, sizes) + _ramp(sizes)
        positions[:, rows] = np.repeat(flat[starts], sizes) + _grid_offsets(sizes, merged)
    lengths = np.diff(borders)
    documents = borders[:-1][lengths > 0]
    positions -= np.repeat(flat[documents], lengths[lengths > 0])
    return torch.from_numpy(positions)


def _media_runs(
    ids: IntArray, grids: Sequence[tuple[int, int, int]], image_pad: int, video_pad: int
) -> tuple[IntArray, IntArray, IntArray]:
    """First token [M], number of tokens [M], merged grid [M, 3] of each media item, checked against the pads."""
    merged = np.asarray(grids, np.int64).reshape(-1, 3) // (1, MERGE_SIZE, MERGE_SIZE)
    sizes = merged.prod(axis=1)
    pads = np.flatnonzero((ids == image_pad) | (ids == video_pad))
    if len(pads) != sizes.sum():
        raise ValueError(f"{len(pads)} media pad tokens, but the grids {list(grids)} hold {int(sizes.sum())}")
    ends = np.cumsum(sizes)
    starts = pads[ends - sizes]
    last = pads[ends - 1]
    broken = (last - starts != sizes - 1) | (ids[starts] != ids[last])
    if broken.any():
        where = int(np.flatnonzero(broken)[0])
        raise ValueError(f"media item {where} of grid {tuple(grids[where])} is not one run of pad tokens")
    return starts, sizes, merged


def _shift_before(num_tokens: int, starts: IntArray, sizes: IntArray, merged: IntArray) -> IntArray:
    """How many positions the media before each token saved, int64 [T] (a run's own saving counts after its end)."""
    saved = np.zeros(num_tokens + 1, np.int64)
    saved[starts + sizes] = sizes - merged.max(axis=1) if len(starts) else 0
    return np.cumsum(saved)[:num_tokens]


def _ramp(sizes: IntArray) -> IntArray:
    """0..n-1 for each n of `sizes`, end to end: [2, 3] gives 0 1 0 1 2."""
    return np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _grid_offsets(sizes: IntArray, merged: IntArray) -> IntArray:
    """(k, i, j) of every media token, row-major in its own grid: int64 [3, sum(sizes)]."""
    local = _ramp(sizes)
    area = np.repeat(merged[:, 1] * merged[:, 2], sizes)
    width = np.repeat(merged[:, 2], sizes)
    return np.stack((local // area, local % area // width, local % width))
