"""The data way of a stage without a pixel: its packs as training will see them, counted and costed.

Enters: a stage, its shards (indices are built where missing), the model's sizes, the ranks. Leaves: `Rehearsal`: fill,
tokens and samples per source, the mixture got against the one wanted, epochs, FLOPs by part, imbalance of ranks. Costs
microseconds per sample; of each source up to 64 records are read, to learn what share of their text is supervised.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from data_pipelines.encode.chat import tokenize_record
from data_pipelines.errors import DataError
from data_pipelines.index.source import SourceIndex
from data_pipelines.loader import new_planner
from data_pipelines.plan.balance import PackCost, imbalance, order_by_cost
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.plan.mixture import shares_at
from data_pipelines.plan.planner import Pack
from data_pipelines.samples import MERGE_SIZE
from qwen2vl_train.config import StageConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import PackLengths, pack_flops
from qwen2vl_train.model.parts import PARTS
from qwen2vl_train.training.balancing import pack_cost, part_costs

LABELLED_RECORDS = 64
COUNTED_SAMPLES = 1_000_000
PATCHES_PER_TOKEN = MERGE_SIZE**2


@dataclass
class SourceRehearsal:
    """One source: what it holds under the stage's budgets, and what the planned packs took of it.

    `usable` samples and `epoch_tokens` are of one epoch; `wanted` and `got` are shares of the samples.
    """

    name: str
    samples: int
    usable: int
    epoch_tokens: int
    supervised_share: float
    wanted: float = 0.0
    got: float = 0.0
    planned_samples: int = 0
    planned_tokens: int = 0
    planned_media_tokens: int = 0


@dataclass(frozen=True)
class Rehearsal:
    """A stage's first `steps` steps. FLOPs are of all these steps, forward and backward, by part.

    `imbalance`: the slowest rank's cost over the mean, summed over micro-steps; 1 is ideal. `imbalance_sorted`: with
    packs of like cost in the same micro-step.
    """

    steps: int
    packs: int
    tokens: int
    supervised: int
    fill: float
    packs_under_98: float
    longest_pack: int
    most_patches: int
    flops: Mapping[str, float]
    imbalance: float
    imbalance_sorted: float
    seconds: float
    sources: Sequence[SourceRehearsal] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps

    @property
    def flops_per_step(self) -> float:
        return sum(self.flops.values()) / self.steps

    def epochs(self, source: SourceRehearsal, steps: float) -> float:
        """How often `source` has been seen after `steps` steps at this rate."""
        return source.planned_samples / self.steps * steps / max(1, source.usable)


def rehearse(
    stage: StageConfig,
    config: ModelConfig,
    sources: list[SourceIndex],
    ranks: int,
    seed: int,
    max_packs: int = 4000,
    max_seconds: float = 30.0,
) -> Rehearsal:
    """Plan the stage's first packs, at least one step and at most `max_packs` or `max_seconds`.

    `ranks` are those that have packs of their own; they divide `stage.packs_per_step`.

    Raises:
        ShardError: a source without one usable sample.
    """
    costs = part_costs(config, stage.trainable)
    whole = pack_cost(config, stage.trainable)
    per_label = _per_label(config, stage.trainable)
    planner = new_planner(stage.data, sources, seed, whole)
    seen = [_survey(source, stage) for source in sources]
    started, steps = time.perf_counter(), 0
    totals = _Totals(stage.data.plan.max_tokens)
    imbalances: dict[str, list[float]] = {"plan": [], "sorted": []}
    while not steps or (
        (totals.tokens if stage.tokens else steps) < stage.length
        and steps < max_packs // stage.packs_per_step
        and time.perf_counter() - started < max_seconds
    ):
        shares = shares_at(planner.phases, planner.tokens)
        packs = [planner.next_pack() for _ in range(stage.packs_per_step)]
        drawn = totals.add(packs, costs, seen)
        for source, share in zip(seen, shares, strict=True):
            source.wanted += drawn * share
        for name, ordered in (("plan", packs), ("sorted", order_by_cost(packs, whole))):
            table = np.array([whole.pack(pack) for pack in ordered]).reshape(-1, ranks)
            imbalances[name].append(imbalance(table))
        steps += 1
    samples = sum(source.planned_samples for source in seen)
    for source in seen:
        source.wanted, source.got = source.wanted / samples, source.planned_samples / samples
    supervised = sum(source.supervised_share * (source.planned_tokens - source.planned_media_tokens) for source in seen)
    fills = np.array(totals.fills)
    return Rehearsal(
        steps=steps,
        packs=len(fills),
        tokens=totals.tokens,
        supervised=int(supervised),
        fill=float(fills.mean()),
        packs_under_98=float((fills < 0.98).mean()),
        longest_pack=totals.longest,
        most_patches=totals.most_patches,
        flops={**totals.flops, "head": supervised * per_label},
        imbalance=float(np.mean(imbalances["plan"])),
        imbalance_sorted=float(np.mean(imbalances["sorted"])),
        seconds=time.perf_counter() - started,
        sources=seen,
    )


def _per_label(config: ModelConfig, trainable: Sequence[str]) -> int:
    return pack_flops(config, PackLengths((), (), 0, 0, 1), trainable).head


class _Totals:
    """Sums over the planned packs."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.tokens = self.longest = self.most_patches = 0
        self.fills: list[float] = []
        self.flops = dict.fromkeys(PARTS, 0.0)

    def add(self, packs: Sequence[Pack], costs: Mapping[str, PackCost], sources: Sequence[SourceRehearsal]) -> int:
        """Count one step; its number of samples."""
        for pack in packs:
            self.tokens += pack.num_tokens
            self.longest = max(self.longest, pack.num_tokens)
            self.most_patches = max(self.most_patches, pack.num_patches)
            self.fills.append(pack.num_tokens / self._max_tokens)
            for part, cost in costs.items():
                self.flops[part] += cost.pack(pack)
            for item in pack.items:
                source = sources[item.source]
                source.planned_samples += 1
                source.planned_tokens += item.tokens
                source.planned_media_tokens += item.patches // PATCHES_PER_TOKEN
        return sum(len(pack.items) for pack in packs)


def _survey(source: SourceIndex, stage: StageConfig) -> SourceRehearsal:
    """What the source holds; beyond a million samples, the first shards stand for the others."""
    usable = tokens = counted = 0
    for shard in range(source.num_shards):
        table = source.table(shard)
        rows = np.arange(table.index.num_samples)
        if len(rows):
            lengths, _ = sample_lengths(source.name, table, rows, stage.data.media, stage.data.plan)
            kept = lengths.tokens[lengths.tokens > 0]
            usable, tokens, counted = usable + len(kept), tokens + int(kept.sum()), counted + len(rows)
        if counted >= COUNTED_SAMPLES:
            break
    scale = source.num_samples / max(1, counted)
    return SourceRehearsal(
        source.name, source.num_samples, round(usable * scale), round(tokens * scale), _supervised_share(source, stage)
    )


def _supervised_share(source: SourceIndex, stage: StageConfig) -> float:
    """Of the text tokens of records evenly spaced over the source; records that cannot be read are passed over."""
    ends = np.cumsum([0] + [source.table(shard).index.num_samples for shard in range(min(source.num_shards, 16))])
    chosen = np.unique(np.linspace(0, max(0, ends[-1] - 1), LABELLED_RECORDS).astype(int)) if ends[-1] else ()
    supervised = text = 0
    for shard, (first, last) in enumerate(pairwise(ends.tolist())):
        for row in (int(number) - first for number in chosen if first <= number < last):
            try:
                record, _ = source.read(shard, row)
                written = tokenize_record(
                    record, source.counting.tokenizer, stage.data.template, record.media, stage.data.vision_ids
                )
            except DataError:
                continue
            supervised += sum(written.supervised)
            text += written.text_tokens
    source.close()
    return supervised / max(1, text)
