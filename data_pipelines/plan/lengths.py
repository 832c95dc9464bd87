"""How many LLM tokens and ViT patches each sample of a block takes, from its index alone.

Enters: a shard's table and row numbers. Leaves: tokens and patches per row, and events for samples that can never be
packed. Costs about 0.5 µs a sample, and 20 µs for one whose media must shrink to fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipelines.config import MediaConfig, PlanConfig
from data_pipelines.encode.budget import (
    MAX_ASPECT,
    PATCHES_PER_TOKEN,
    TOKEN_PIXELS,
    TOKEN_SIDE,
    plan_media,
    within_patches,
)
from data_pipelines.errors import DataError
from data_pipelines.index.source import ShardTable, SourceIndex
from data_pipelines.samples import LedgerEvent

IntArray = npt.NDArray[np.int64]
_COUNTED_SAMPLES = 1_000_000
_TRIED_SHARDS, _TRIED_SAMPLES = 16, 16_384


@dataclass(frozen=True, slots=True)
class Lengths:
    """What samples take, int64 [n] each: LLM tokens (-1: not usable), ViT patches, sum of p^2 over ViT segments."""

    tokens: IntArray
    patches: IntArray
    patch_pairs: IntArray


def sample_lengths(
    source: str, table: ShardTable, rows: IntArray, media: MediaConfig, plan: PlanConfig
) -> tuple[Lengths, list[LedgerEvent]]:
    """The lengths of `rows`, and what cannot be packed.

    Samples whose text could not be counted are among the table's problems; the events tell of those that do not fit a
    pack with their media shrunk, and what would make them fit.
    """
    media = within_patches(media, plan.max_patches)
    text = table.text_tokens[rows].astype(np.int64)
    # The encoder shortens plain text at its end rather than lose it; every other sample is kept whole or left out.
    text = np.where(table.truncatable[rows] == 1, np.minimum(text, plan.max_tokens), text)
    media_tokens, pairs = _natural_sums(table, rows, media)
    limit = np.minimum(media.max_media_tokens, plan.max_tokens - text)
    usable = text >= 0
    events = []
    for i in np.flatnonzero(usable & ((media_tokens < 0) | (media_tokens > limit))):
        row = int(rows[i])
        key = table.index.key(row)
        try:
            plans = plan_media(table.index.media(row), int(text[i]), media, plan.max_tokens, key)
        except DataError as error:
            usable[i] = False
            events.append(LedgerEvent(source, key, error.reason, error.message, indexed=True))
            continue
        media_tokens[i] = sum(item.num_tokens for item in plans)
        pairs[i] = sum(t * (h * w) ** 2 for t, h, w in (item.grid_thw for item in plans))
    tokens = np.where(usable, text + media_tokens, -1)
    return Lengths(tokens, np.where(usable, PATCHES_PER_TOKEN * media_tokens, 0), pairs), events


def count_usable(source: SourceIndex, media: MediaConfig, plan: PlanConfig) -> int:
    """How many of a source's samples fit a pack. Beyond a million, the first shards stand for the others."""
    usable = counted = 0
    for shard in range(source.num_shards):
        table = source.table(shard)
        lengths, _ = sample_lengths(source.name, table, np.arange(table.index.num_samples), media, plan)
        usable, counted = usable + int((lengths.tokens > 0).sum()), counted + len(lengths.tokens)
        if counted >= _COUNTED_SAMPLES:
            break
    return round(usable * source.num_samples / max(1, counted))


def fit_of_some(source: SourceIndex, media: MediaConfig, plan: PlanConfig) -> tuple[int, list[LedgerEvent]]:
    """How many of a source's countable samples were looked at, and what fits no pack of them.

    All of a source of up to 16 shards and 16,384 samples; of a larger one every so manieth, in shards evenly spaced.
    """
    looked_at, events = 0, list[LedgerEvent]()
    for shard in np.unique(np.linspace(0, source.num_shards - 1, _TRIED_SHARDS).astype(int)).tolist():
        table = source.table(shard)
        size = table.index.num_samples
        rows = np.arange(0, size, max(1, -(-size * min(source.num_shards, _TRIED_SHARDS) // _TRIED_SAMPLES)))
        rows = rows[table.text_tokens[rows] >= 0]
        _, unfit = sample_lengths(source.name, table, rows, media, plan)
        looked_at, events = looked_at + len(rows), events + unfit
    return looked_at, events


def _natural_sums(table: ShardTable, rows: IntArray, media: MediaConfig) -> tuple[IntArray, IntArray]:
    """Media tokens and patch pairs of each sample where nothing has to shrink, int64 [n] each; -1: ask `plan_media`.

    The rules of `encode.budget` for all items at once; a property test holds the two together.
    """
    ends = table.index.arrays["media_ends"]
    last = ends[rows].astype(np.int64)
    count = last - np.where(rows > 0, ends[rows - 1], 0).astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), count)
    item = np.repeat(last, count) - 1 - _countdown(count)
    tokens, steps = _natural_tokens(table, item, media), _temporal_steps(table, item, media)
    unknown = np.bincount(owner, (tokens < 0) | (steps < 0), len(rows)) > 0
    # Whole numbers below 2^53 are exact in bincount's floats: 16,384 tokens are 2^32 pairs.
    sums = np.bincount(owner, tokens * steps, len(rows))
    pairs = np.bincount(owner, steps * (PATCHES_PER_TOKEN * tokens) ** 2, len(rows))
    return np.where(unknown, -1, sums).astype(np.int64), np.where(unknown, 0, pairs).astype(np.int64)


def _natural_tokens(table: ShardTable, item: IntArray, media: MediaConfig) -> IntArray:
    """Tokens of one temporal step of each media item, -1 for sizes that are refused."""
    a = table.index.arrays
    video = a["media_kind"][item] == 1
    height, width = a["media_height"][item].astype(np.float64), a["media_width"][item].astype(np.float64)
    low = np.where(video, media.video_min_pixels, media.min_pixels)
    high = np.where(video, media.video_max_pixels, media.max_pixels)
    low = np.where(a["part_min_pixels"][item] >= 0, a["part_min_pixels"][item], low)
    high = np.where(a["part_max_pixels"][item] >= 0, a["part_max_pixels"][item], high)
    low = np.minimum(low, high)
    valid = (height >= 1) & (width >= 1) & (height <= MAX_ASPECT * width) & (width <= MAX_ASPECT * height) & (high > 0)
    pixels, high = np.where(valid, height * width, 1.0), np.maximum(high, 1)
    rows, columns = np.rint(height / TOKEN_SIDE), np.rint(width / TOKEN_SIDE)
    area = rows * columns * TOKEN_PIXELS
    over, under = area > high, area < low
    beta = np.sqrt(pixels / high)
    rows = np.where(over, np.maximum(1, np.floor(height / beta / TOKEN_SIDE)), rows)
    columns = np.where(over, np.maximum(1, np.floor(width / beta / TOKEN_SIDE)), columns)
    beta = np.sqrt(low / pixels)
    rows = np.where(under & ~over, np.ceil(height * beta / TOKEN_SIDE), rows)
    columns = np.where(under & ~over, np.ceil(width * beta / TOKEN_SIDE), columns)
    return np.where(valid, rows * columns, -1).astype(np.int64)


def _temporal_steps(table: ShardTable, item: IntArray, media: MediaConfig) -> IntArray:
    """Pairs of frames of each media item: 1 for a still image; -1 where rounding is too close to call."""
    a = table.index.arrays
    frames, stored_fps, duration = a["media_frames"][item], a["media_fps"][item], a["media_duration"][item]
    with np.errstate(divide="ignore", invalid="ignore"):
        by_frames = np.where(stored_fps > 0, frames / stored_fps, 0.0)
    duration = np.where(duration > 0, duration, by_frames)
    fps = np.where(np.isnan(a["part_fps"][item]), media.fps, a["part_fps"][item])
    wanted = np.maximum(duration * fps, -(-media.min_frames // 2) * 2)
    wanted = np.where(a["part_nframes"][item] >= 0, a["part_nframes"][item], wanted)
    wanted = np.minimum(wanted, media.max_frames)
    wanted = np.where(frames > 0, np.minimum(wanted, frames), wanted)
    thousandths = wanted * 1000
    # Python rounds the decimal, numpy the product: where they could differ, the scalar rule decides.
    close = np.abs(thousandths - np.floor(thousandths) - 0.5) < 1e-3
    steps = np.maximum(1, np.floor(np.round(wanted, 3) / 2))
    return np.where(a["media_kind"][item] == 0, 1, np.where(close, -1, steps)).astype(np.int64)


def _countdown(count: IntArray) -> IntArray:
    """n-1..0 for each n of `count`, end to end: [2, 3] gives 1 0 2 1 0."""
    return np.repeat(np.cumsum(count), count) - 1 - np.arange(int(count.sum()))
