"""Sources without files: tables of lengths made from a seed, shard by shard, for data sets of any size.

Lengths follow a mixed diet: plain text, single pictures of many sizes, documents of several pictures, clips.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from data_pipelines.index.samples import ShardIndex
from data_pipelines.index.source import ShardTable

SHARD_SIZE = 10_000


class SimulatedSource:
    """Stands in for a `SourceIndex` towards the planner: `num_samples` samples in shards of at most 10,000."""

    def __init__(self, name: str, num_samples: int, kind: str, seed: int = 0) -> None:
        self.name, self.kind, self.seed = name, kind, seed
        self.shard_size = min(SHARD_SIZE, num_samples)
        self.num_shards = max(1, num_samples // self.shard_size)
        self.num_samples = self.num_shards * self.shard_size
        self._tables: dict[int, ShardTable] = {}

    def table(self, shard: int) -> ShardTable:
        """The shard's table; 40 different ones serve for all and are kept: making them is not the planner's time."""
        number = shard % 40
        if number not in self._tables:
            self._tables[number] = make_table(self.kind, self.shard_size, self.seed * 40 + number)
        return self._tables[number]


def mixed_sources(num_samples: int) -> tuple[list[SimulatedSource], list[float]]:
    """Four sources that share `num_samples`, and their weights."""
    shares = {"text": 0.4, "picture": 0.45, "pictures": 0.1, "clip": 0.05}
    sources = [
        SimulatedSource(kind, max(100, int(num_samples * share)), kind, seed)
        for seed, (kind, share) in enumerate(shares.items())
    ]
    return sources, list(shares.values())


def make_table(kind: str, size: int, seed: int) -> ShardTable:
    """`size` samples of one kind: medians of 400 tokens a text (35 if "short"), 0.4 megapixels, 20 s a clip."""
    rng = np.random.default_rng(seed)
    is_text = kind in ("text", "short")
    several = rng.integers(2, 6, size)
    per_sample = several if kind == "pictures" else np.zeros(size, int) if is_text else np.ones(size, int)
    count = int(per_sample.sum())
    megapixels = np.clip(rng.lognormal(np.log(0.4), 0.8, count), 0.02, 12)
    aspect = np.exp(rng.normal(0, 0.35, count))
    width = np.sqrt(megapixels * 1e6 * aspect)
    duration = np.clip(rng.lognormal(np.log(20), 0.8, count), 2, 300)
    arrays = {
        "media_ends": np.cumsum(per_sample).astype(np.uint64),
        "media_kind": np.full(count, kind == "clip", np.uint8),
        "media_name": np.zeros(count, np.uint32),
        "media_width": width.astype(np.uint32) + 1,
        "media_height": (width / aspect).astype(np.uint32) + 1,
        "media_frames": np.where(kind == "clip", duration * 30, 1).astype(np.uint32),
        "media_fps": np.full(count, 30.0 if kind == "clip" else 0.0),
        "media_duration": duration if kind == "clip" else np.zeros(count),
        "part_min_pixels": np.full(count, -1),
        "part_max_pixels": np.full(count, -1),
        "part_fps": np.full(count, np.nan),
        "part_nframes": np.full(count, -1),
        "task": np.zeros(size, np.uint32),
    }
    told = {"names": ["m"], "tasks": [kind], "problems": [], "unlisted": {}}
    meta = {"num_samples": size, "size": 0, "tag": "", "rows": "", "content": "", **told}
    columns = SimpleNamespace(arrays=arrays, meta=meta, text=lambda name, row: str(row))
    median = {"text": 400, "short": 35}.get(kind, 80)
    text = np.clip(rng.lognormal(np.log(median), 0.8, size), 8, 16384).astype(np.int32)
    return ShardTable(ShardIndex(columns), text, np.full(size, is_text, np.uint8), (), {})
