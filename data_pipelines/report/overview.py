"""A survey as the page's charts take it: tiles, the mixture's rows, histograms, the picture of each pack.

Enters: a `Survey` and planned packs. Leaves: JSON-able values of a size that does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.config import DataConfig
from data_pipelines.index.source import SourceIndex
from data_pipelines.plan.planner import Pack
from data_pipelines.report.survey import Survey, fills

FloatArray = npt.NDArray[np.float64]
MAX_SIZE_CELLS = 900


def mixture_rows(survey: Survey) -> list[dict[str, Any]]:
    """One row per task of a data set: samples, tokens, and their 5%, 50%, 95% and 100% points."""
    rows = []
    for group in survey.groups:
        spread = np.percentile(group.tokens, (5, 50, 95, 100)).round().astype(int).tolist() if len(group.tokens) else []
        rows.append(
            {
                "dataset": group.dataset,
                "task": group.task,
                "samples": len(group.tokens),
                "tokens": int(group.tokens.sum()),
                "spread": spread,
            }
        )
    return rows


def charts(survey: Survey, packs: Sequence[Pack], config: DataConfig) -> dict[str, Any]:
    """Histograms: tokens of a sample (by data set), sizes of pictures, seconds of clips, fill of packs."""
    names = list(survey.media)
    lengths = [
        np.concatenate([group.tokens for group in survey.groups if group.dataset == name] or [np.zeros(0, np.int64)])
        for name in names
    ]
    seconds = [sizes.clip_seconds for sizes in survey.media.values()]
    full = fills(packs, config)
    return {
        "lengths": _log_histogram(lengths, steps=3),
        "seconds": _log_histogram(seconds, steps=2),
        "sizes": _size_cells([np.concatenate((m.images, m.clip_sizes)) for m in survey.media.values()]),
        "fill": _fill_histogram(full),
    }


def pack_rows(
    packs: Sequence[Pack], sources: Sequence[SourceIndex], places: Mapping[tuple[int, int], int]
) -> list[Any]:
    """Each pack with its documents [data set, tokens, patches, key, number of the page's document or -1].

    `places` gives the page's document for (pack number, item number).
    """
    rows = []
    for pack in packs:
        documents = [
            [
                item.source, item.tokens, item.patches, sources[item.source].key(item.shard, item.row),
                places.get((pack.number, number), -1),
            ]
            for number, item in enumerate(pack.items)
        ]  # fmt: skip
        rows.append({"number": pack.number, "tokens": pack.num_tokens, "patches": pack.num_patches, "docs": documents})
    return rows


def _log_histogram(series: Sequence[npt.NDArray[Any]], steps: int) -> dict[str, Any] | None:
    """Counts per series in bins whose edges are powers of 2^(1/steps); None where there is nothing to count."""
    values = np.concatenate([*series, np.zeros(0)])
    values = values[values > 0]
    if not len(values):
        return None
    low, high = steps * np.floor(np.log2(values.min())), np.floor(steps * np.log2(values.max())) + 1
    edges = 2 ** (np.arange(low, high + 1) / steps)
    edges[-1] = max(edges[-1], values.max())
    counts = [np.histogram(numbers, edges)[0].tolist() for numbers in series]
    return {"edges": edges.round(3).tolist(), "counts": counts, "step": steps}


def _size_cells(series: Sequence[npt.NDArray[np.int64]]) -> list[list[float]]:
    """Pictures by size: [data set, width, height, count], sizes gathered on a grid of 2^(1/4) where there are many."""
    cells: list[list[float]] = []
    for number, sizes in enumerate(series):
        sizes = sizes[(sizes > 0).all(axis=1)]
        if not len(sizes):
            continue
        exact, counts = np.unique(sizes, axis=0, return_counts=True)
        if len(exact) > MAX_SIZE_CELLS // len(series):
            exact, counts = np.unique((4 * np.log2(sizes)).round() / 4, axis=0, return_counts=True)
            exact = 2**exact
        cells += [[number, round(float(w)), round(float(h)), int(n)] for (w, h), n in zip(exact, counts, strict=True)]
    return cells


def _fill_histogram(full: FloatArray) -> dict[str, Any] | None:
    """Packs by fill, in steps of 0.5% from the emptiest (95% at most) to 100%."""
    if not len(full):
        return None
    edges = np.arange(min(95, int(100 * full.min())), 100.1, 0.5)
    counts = np.histogram(np.minimum(100 * full, 99.999), edges)[0]
    return {"edges": edges.tolist(), "counts": [counts.tolist()], "step": 2}
