"""The data way of a stage without a pixel: its packs as training will see them, counted and costed.

Enters: a stage, its shards (indices are built where missing), the model's sizes, the ranks. Leaves: `Rehearsal`: fill,
tokens and samples per source, the mixture got against the one wanted, epochs, FLOPs by part, imbalance of ranks. Costs
microseconds per sample; of each source up to 64 records are read, to learn what share of their text is supervised.

A stage longer than what is planned is rehearsed in slices: one from the beginning of each phase of the mixture, each
standing for its phase's tokens. Counts alone bound them, so the figures are the same on any machine.
"""

from __future__ import annotations

import math
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
from data_pipelines.plan.mixture import Phase, shares_at
from data_pipelines.plan.planner import Pack, Planner
from data_pipelines.samples import MERGE_SIZE
from qwen2vl_train.config import StageConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import PackLengths, pack_flops
from qwen2vl_train.model.parts import PARTS
from qwen2vl_train.training.balancing import pack_cost, part_costs

LABELLED_RECORDS = 64
COUNTED_SAMPLES = 1_000_000
PLANNED_SAMPLES = 1_000_000  # about 5 µs each, costs of all parts included
PATCHES_PER_TOKEN = MERGE_SIZE**2


@dataclass
class SourceRehearsal:
    """One source: what it holds under the stage's budgets, and what the planned packs took of it.

    `usable` samples and `epoch_tokens` are of one epoch; `wanted` and `got` are shares of the samples. What is
    `planned` counts as `Rehearsal`'s totals do.
    """

    name: str
    samples: int
    usable: int
    epoch_tokens: int
    supervised_share: float
    wanted: float = 0.0
    got: float = 0.0
    planned_samples: float = 0.0
    planned_tokens: float = 0.0
    planned_media_tokens: float = 0.0


@dataclass
class Slice:
    """The part of a stage under one mixture, from `from_tokens` on: `steps` of its `of_steps` were planned."""

    from_tokens: float
    steps: int = 0
    of_steps: float = 0.0


@dataclass(frozen=True)
class Rehearsal:
    """What `steps` steps of a stage's `stage_steps` are like: all of them, or as many as were planned, in `slices`.

    Totals are of `steps` steps in which every phase of the mixture has the share that it has of the stage. FLOPs are
    forward and backward, by part. `imbalance`: the slowest rank's cost over the mean, summed over micro-steps; 1 is
    ideal. `imbalance_sorted`: with packs of like cost in the same micro-step.
    """

    steps: int
    stage_steps: int
    packs: int
    tokens: float
    supervised: int
    fill: float
    packs_under_98: float
    longest_pack: int
    most_patches: int
    flops: Mapping[str, float]
    imbalance: float
    imbalance_sorted: float
    slices: Sequence[Slice] = field(default_factory=list)
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
) -> Rehearsal:
    """Plan a stage, or slices of it with at most `max_packs` packs and a million samples (but a step of each phase).

    `ranks` are those that have packs of their own; they divide `stage.packs_per_step`.

    Raises:
        ShardError: a source without one usable sample.
    """
    costs, whole = part_costs(config, stage.trainable), pack_cost(config, stage.trainable)
    slices = _plan_slices(stage, sources, seed, max_packs, _Costs(costs, whole, ranks))
    steps, stage_steps = sum(part.steps for part, _ in slices), sum(part.of_steps for part, _ in slices)
    total = _Counts(len(sources))
    for part, counted in slices:
        total.add(counted, part.of_steps * steps / (part.steps * stage_steps))
    seen, packs = [_survey(source, stage) for source in sources], steps * stage.packs_per_step
    for source, (samples, wanted, tokens, media) in zip(seen, total.by_source.tolist(), strict=True):
        source.planned_samples, source.planned_tokens, source.planned_media_tokens = samples, tokens, media
        source.wanted, source.got = (count / total.by_source[:, 0].sum() for count in (wanted, samples))
    supervised = sum(source.supervised_share * (source.planned_tokens - source.planned_media_tokens) for source in seen)
    return Rehearsal(
        steps=steps,
        stage_steps=math.ceil(stage_steps),
        packs=packs,
        tokens=total.tokens,
        supervised=int(supervised),
        fill=total.tokens / (packs * stage.data.plan.max_tokens),
        packs_under_98=total.under_98 / packs,
        longest_pack=total.longest,
        most_patches=total.most_patches,
        flops={**total.flops, "head": supervised * _per_label(config, stage.trainable)},
        imbalance=total.imbalance / steps,
        imbalance_sorted=total.imbalance_sorted / steps,
        slices=[part for part, _ in slices],
        sources=seen,
    )


def _plan_slices(
    stage: StageConfig, sources: list[SourceIndex], seed: int, max_packs: int, costs: _Costs
) -> list[tuple[Slice, _Counts]]:
    """Plan the stage, a slice of each phase of its mixture; the whole where `max_packs` are enough for it.

    The packs that may be planned are dealt to the phases by their tokens. Between slices the plan skips ahead.
    """
    planner = new_planner(stage.data, sources, seed, costs.whole)
    slices: list[tuple[Slice, _Counts]] = []
    most_steps, done = max_packs // stage.packs_per_step, 0.0
    for phase, following in pairwise([*planner.phases, Phase(math.inf, ())]):
        begin, end = max(phase.from_tokens, planner.tokens), min(following.from_tokens, stage.tokens or math.inf)
        if begin >= end or (stage.steps and done >= stage.steps):
            continue  # shorter than a step, or behind the stage's end
        if begin > planner.tokens:
            _skip_to(planner, begin, stage.data.plan.pool_size)
        part, counts = Slice(begin), _Counts(len(sources))
        stage_left, may = stage.steps - done if stage.steps else math.inf, math.inf
        while not part.steps or (planner.tokens < end and part.steps < min(may, stage_left)):
            shares = shares_at(planner.phases, planner.tokens)
            packs = [planner.next_pack() for _ in range(stage.packs_per_step)]
            counts.count(packs, shares, stage.data.plan.max_tokens, costs)
            part.steps += 1
            if part.steps == 1:  # what a step takes is known from here
                most_steps = min(most_steps, PLANNED_SAMPLES // max(1, int(counts.by_source[:, 0].sum())))
                left = stage_left if stage.steps else (stage.tokens - begin) / counts.tokens
                room = most_steps - sum(other.steps for other, _ in slices)
                share = min(1.0, (end - begin) / (left * counts.tokens))
                may = room if left <= room else int(room * share)
        cut = planner.tokens < end and part.steps < stage_left
        part.of_steps = min((end - begin) * part.steps / counts.tokens, stage_left) if cut else part.steps
        done += part.of_steps
        slices.append((part, counts))
    return slices


def _skip_to(planner: Planner, tokens: float, pool_size: int) -> None:
    """Go on as if `tokens` were planned, the pool filled under the mixture of then: no sample waits for more packs."""
    for _ in range(pool_size):
        planner.tokens = math.ceil(tokens)
        planner.next_pack()
    planner.tokens = math.ceil(tokens)


def _per_label(config: ModelConfig, trainable: Sequence[str]) -> int:
    return pack_flops(config, PackLengths((), (), 0, 0, 1), trainable).head


@dataclass(frozen=True)
class _Costs:
    """FLOPs of a pack by part and in all, and the ranks that a step's packs are dealt to."""

    parts: Mapping[str, PackCost]
    whole: PackCost
    ranks: int


class _Counts:
    """Sums over planned steps. `by_source` [sources, 4]: samples, those wanted, tokens, media tokens."""

    def __init__(self, num_sources: int) -> None:
        self.tokens = self.under_98 = self.imbalance = self.imbalance_sorted = 0.0
        self.longest = self.most_patches = 0
        self.flops = dict.fromkeys(PARTS, 0.0)
        self.by_source = np.zeros((num_sources, 4))

    def count(self, packs: Sequence[Pack], shares: Sequence[float], max_tokens: int, costs: _Costs) -> None:
        """Count one step; `shares` [sources] of its samples were asked for."""
        for pack in packs:
            self.tokens += pack.num_tokens
            self.longest = max(self.longest, pack.num_tokens)
            self.most_patches = max(self.most_patches, pack.num_patches)
            self.under_98 += pack.num_tokens < 0.98 * max_tokens
            for part, cost in costs.parts.items():
                self.flops[part] += cost.pack(pack)
        rows = np.array([(item.source, item.tokens, item.patches) for pack in packs for item in pack.items])
        source, tokens, media = rows[:, 0], rows[:, 1], rows[:, 2] // PATCHES_PER_TOKEN
        for column, weights in ((0, None), (2, tokens), (3, media)):
            self.by_source[:, column] += np.bincount(source, weights, len(shares))
        self.by_source[:, 1] += np.multiply(shares, len(rows))
        self.imbalance += _imbalance(packs, costs)
        self.imbalance_sorted += _imbalance(order_by_cost(packs, costs.whole), costs)

    def add(self, other: _Counts, weight: float) -> None:
        """Add `other`'s sums times `weight`."""
        for name in ("tokens", "under_98", "imbalance", "imbalance_sorted", "by_source"):
            setattr(self, name, getattr(self, name) + weight * getattr(other, name))
        for name in ("longest", "most_patches"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for part, flops in other.flops.items():
            self.flops[part] += weight * flops


def _imbalance(packs: Sequence[Pack], costs: _Costs) -> float:
    return imbalance(np.array([costs.whole.pack(pack) for pack in packs]).reshape(-1, costs.ranks))


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
