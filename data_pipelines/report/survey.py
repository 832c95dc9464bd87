"""What a mixture holds, from its indices alone: sizes per data set and task, lengths, resolutions, durations, fill.

Enters: sources with their indices, and the plan's settings. Leaves: a `Survey`. Lengths are the planner's own, and the
fill is that of the packs it plans; nothing is decoded. Costs about 1 µs a sample, and 2 µs a sample planned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data_pipelines.config import DataConfig
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import LOSSLESS
from data_pipelines.loader import new_planner
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.plan.planner import Pack
from data_pipelines.report.data_run import DataRun
from data_pipelines.samples import LedgerEvent

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """One task of one data set: where its usable samples lie (shard, row) [n, 2], and their tokens int64 [n]."""

    dataset: str
    task: str
    places: IntArray
    tokens: IntArray


@dataclass(frozen=True)
class MediaSizes:
    """The media of one data set: stills (width, height) int64 [k, 2]; clips too, with seconds and rates float64 [c]."""

    images: IntArray
    clip_sizes: IntArray
    clip_seconds: FloatArray
    clip_rates: FloatArray


@dataclass(frozen=True)
class Survey:
    """What the indices say. `problems` are samples (or shards) a run would leave out or note, with their keys.

    `unlisted` counts those that an index of a very bad shard does not list one by one, by reason.
    """

    groups: list[Group] = field(default_factory=list)
    media: dict[str, MediaSizes] = field(default_factory=dict)
    problems: list[LedgerEvent] = field(default_factory=list)
    unlisted: Counter[str] = field(default_factory=Counter)

    @property
    def num_samples(self) -> int:
        """Usable samples."""
        return sum(len(group.tokens) for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens of all usable samples."""
        return sum(int(group.tokens.sum()) for group in self.groups)

    @property
    def left_out(self) -> int:
        """Samples that a run cannot use."""
        listed = sum(problem.reason not in LOSSLESS for problem in self.problems)
        return listed + sum(count for reason, count in self.unlisted.items() if reason not in LOSSLESS)


def survey_sources(sources: Sequence[SourceIndex], config: DataConfig) -> Survey:
    """Sizes and lengths of all samples of `sources`."""
    survey = Survey()
    for source in sources:
        by_task: dict[str, list[tuple[IntArray, IntArray]]] = {}
        media: list[tuple[npt.NDArray[np.bool_], FloatArray]] = []
        for shard in range(source.num_shards):
            table = source.table(shard)
            survey.problems.extend(LedgerEvent(source.name, *problem, indexed=True) for problem in table.problems)
            survey.unlisted.update(table.unlisted)
            rows = np.arange(table.index.num_samples)
            lengths, events = sample_lengths(source.name, table, rows, config.media, config.plan)
            survey.problems.extend(events)
            for number in np.unique(table.index.arrays["task"]):
                chosen = (table.index.arrays["task"] == number) & (lengths.tokens > 0)
                places = np.stack((np.full(int(chosen.sum()), shard), rows[chosen]), axis=1)
                group = by_task.setdefault(table.index.task_name(int(number)), [])
                group.append((places, lengths.tokens[chosen]))
            a = table.index.arrays
            names = ("media_width", "media_height", "media_duration", "media_fps")
            media.append((a["media_kind"] == 1, np.stack([a[name].astype(np.float64) for name in names], axis=1)))
        for task, parts in by_task.items():
            places, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
            survey.groups.append(Group(source.name, task, places, tokens))
        survey.media[source.name] = _media_sizes(media)
    return survey


def plan_packs(sources: Sequence[SourceIndex], run: DataRun, num_tokens: int, limit: int) -> list[Pack]:
    """The first packs of the plan: about those of one pass over `num_tokens`, at most `limit`."""
    if num_tokens == 0:
        return []  # nothing usable, which a plan refuses
    planner = new_planner(run.data, list(sources), run.seed, run.cost)
    packs: list[Pack] = []
    while len(packs) < limit and planner.tokens < max(1, num_tokens - run.data.plan.max_tokens // 2):
        packs.append(planner.next_pack())
    return packs


def fills(packs: Sequence[Pack], config: DataConfig) -> FloatArray:
    """How full each pack is, float64 [packs]: its share of max_tokens, or of max_patches where that is larger."""
    plan = config.plan
    return np.array([max(p.num_tokens / plan.max_tokens, p.num_patches / plan.max_patches) for p in packs], np.float64)


def _media_sizes(parts: Sequence[tuple[npt.NDArray[np.bool_], FloatArray]]) -> MediaSizes:
    video = np.concatenate([kind for kind, _ in parts])
    facts = np.concatenate([values for _, values in parts])
    sizes = facts[:, :2].astype(np.int64)
    return MediaSizes(sizes[~video], sizes[video], facts[video, 2], facts[video, 3])
