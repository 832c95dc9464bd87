"""The data way put together: index → plan → read, decode, encode → collate, in workers, as packs of this rank.

Enters: a stage's `DataConfig`, the tokenizer, rank and world. Leaves: per global step this rank's `PackedBatch`es.
Step s takes packs [s*B, (s+1)*B) of the plan (B packs_per_step), in plan order or, given a cost, the dearest first;
micro-step m of rank r is number m*world + r of them. So a step's packs are the same whatever the world size or the
number of workers, and the loader's state is the plan's. Every rank runs the whole plan (lengths only), ahead of need
in a process of its own where there are workers, and decodes its own packs.

A sample that fails leaves its pack and becomes a `LedgerEvent` in `batch.events`; the plan does not move.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

from data_pipelines.config import DataConfig
from data_pipelines.errors import ShardError, UserError
from data_pipelines.index.build import Counting, build_missing
from data_pipelines.index.progress import Progress
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import LOSSLESS
from data_pipelines.pack.plan_process import PlannedStep, PlanProcess
from data_pipelines.pack.prefetch import InProcess, batches_of
from data_pipelines.pack.read import PackReader
from data_pipelines.pack.slots import packs_ahead, slot_bytes
from data_pipelines.pack.workers import NameSample, NameShards, WorkerPool
from data_pipelines.plan.balance import PackCost, order_by_cost
from data_pipelines.plan.change import SourceFacts, carry_over
from data_pipelines.plan.lengths import count_usable, fit_of_some
from data_pipelines.plan.mixture import mixture_phases, shares_at
from data_pipelines.plan.planner import Pack, Planner
from data_pipelines.samples import PackedBatch
from data_pipelines.shards.names import is_remote, public_name
from data_pipelines.shards.storage import expand_shards
from data_pipelines.tokenizer import TextTokenizer

STATE_VERSION = 3
SOURCE = "source "
_ORDER = "order of the sources"
_SHOWN_SHARDS = 4
# Of `loader.sample_timeout_s`: so long without a sign of life, a process is stuck. By default less than
# `watchdog.stall_s`, so that one hang is mended before that.
STALL_DEADLINES = 2
# Settings of media that decide no count: how bytes become pixels, and which are refused.
_DECODING = ("video_backend", "decode_timeout_s", "max_source_bytes", "max_source_pixels")


def open_sources(
    config: DataConfig, tokenizer: TextTokenizer, processes: int | None = None, progress: Progress | None = None
) -> list[SourceIndex]:
    """The sources of a mixture with all their indices built, in the order of `config.sources`.

    Raises:
        ShardError: a pattern that names no shard, or a shard that cannot be read.
    """
    counting = Counting(tokenizer, config.template, config.vision_ids)
    sources = [
        SourceIndex(name, expand_shards(name, source.shards, config.remote), counting, config.remote)
        for name, source in config.sources.items()
    ]
    shards = dict.fromkeys(shard for source in sources for shard in source.shards)
    build_missing(list(shards), counting, processes, progress, config.remote)
    for source in sources:
        _check_error_rate(source, config.sources[source.name].max_error_rate)
    return sources


def new_planner(config: DataConfig, sources: list[SourceIndex], seed: int, cost: PackCost | None = None) -> Planner:
    """The plan of a mixture, at its beginning; `cost` is needed for balanced packing."""
    phases = mixture_phases(
        list(config.sources.values()),
        lambda: [count_usable(source, config.media, config.plan) for source in sources],
        config.plan.size_temperature,
    )
    return Planner(sources, phases, config.media, config.plan, seed, cost)


def _check_error_rate(source: SourceIndex, limit: float) -> None:
    """Refuse a source (of 100 samples or more) whose index left out more than `limit` of them."""
    counts = source.counts()
    kept = counts.usable
    left_out = Counter({reason: n for reason, n in counts.left_out.items() if reason not in LOSSLESS})
    lost = left_out.total()
    if lost + kept >= 100 and lost > limit * (lost + kept):
        reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.most_common(5))
        raise ShardError(
            source.name,
            "error_budget",
            f"{lost} of {lost + kept} samples cannot be used, over max_error_rate {limit}: {reasons}. `qwen2vl-data "
            "index --list` lists each one; repair or drop them, or raise the source's max_error_rate",
        )


def check_fit(sources: Sequence[SourceIndex], config: DataConfig) -> None:
    """Refuse a source of which nothing fits a pack, or (of 100 samples or more) less than its `max_error_rate` allows.

    Of large sources some 16,000 samples are looked at, spread over 16 shards at most: under 20 ms where these lie on
    a disk, two more requests each where they are remote.

    Raises:
        ShardError: with what would make an example fit.
    """
    for source in sources:
        looked_at, events = fit_of_some(source, config.media, config.plan)
        reasons = Counter(event.reason for event in events)
        lost, limit = len(events), config.sources[source.name].max_error_rate
        if lost and (lost == looked_at or (looked_at >= 100 and lost > limit * looked_at)):
            listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
            told = f"{lost} of {looked_at} samples looked at fit no pack"
            example = f"{listed}. For example {events[0].key}: {events[0].message}"
            if lost < looked_at:
                told += f", over max_error_rate {limit}"
                example += "; or raise the source's max_error_rate"
            raise ShardError(source.name, "error_budget", f"{told}: {example}")


class PackLoader:
    """This rank's packs, step after step, without end. Use it once per process; `close()` ends its processes.

    `dataset_names[i]` is the name of dataset number i in the batches. `cost` (of the model) lets packs of like cost
    share a micro-step, so that ranks wait less for one another; it changes the order inside a step only.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: TextTokenizer,
        packs_per_step: int,
        rank: int,
        world: int,
        seed: int,
        pin_memory: bool = False,
        cost: PackCost | None = None,
    ) -> None:
        check_step(config, packs_per_step, rank, world)
        self.dataset_names = tuple(config.sources)
        self._config, self._tokenizer, self._pin_memory = config, tokenizer, pin_memory
        self._packs_per_step, self._rank, self._world, self._seed = packs_per_step, rank, world, seed
        self._cost = cost
        self._sources = open_sources(config, tokenizer)
        check_fit(self._sources, config)
        self._planner = self._new_planner()
        self._state = self._planner.state_dict()
        self._plan: PlanProcess | None = None
        self._pool: WorkerPool | InProcess | None = None

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Steps from the current state on; each is this rank's packs in slot order."""
        self.close()
        ahead: deque[dict[str, Any]] = deque()
        batches = self._batches(ahead)
        while True:
            step = list(islice(batches, self._packs_per_step // self._world))
            if not step:
                return  # closed meanwhile
            # What counts as done is what was handed out; packs that workers hold ready are planned again on a resume.
            self._state = ahead.popleft()
            yield step

    def shares(self, tokens: int) -> dict[str, float]:
        """The share of samples that each source is to give after `tokens` of training."""
        return dict(zip(self.dataset_names, shares_at(self._planner.phases, tokens), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out: JSON-able, the same on every rank, readable under any world size."""
        return {"version": STATE_VERSION, "identity": self._identity(), "plan": self._state}

    def load_state_dict(self, state: dict[str, Any], accept_changes: bool = False) -> list[str]:
        """Continue after the step at which `state` was taken; call it before iterating.

        `accept_changes` allows other weights, sources and shards than the state's; what restarts is returned, in words.

        Raises:
            UserError: the state belongs to other data, budgets or seed; the message names what differs.
        """
        mine, theirs = self._identity(), state["identity"]
        changed = check_identity(state, mine, accept_changes)
        plan, notes = state["plan"], list[str]()
        if changed:
            plan, notes = carry_over(plan, source_facts(theirs), source_facts(mine), self._planner.phases)
        self._planner.load_state_dict(plan)
        self._state = self._planner.state_dict()
        return notes

    def under_way(self) -> list[str]:
        """What each busy worker, or the planner that is waited for, is at: for a report about a rank without packs."""
        pool, plan = self._pool, self._plan
        return [*(pool.under_way() if pool is not None else ()), *(plan.feed.under_way() if plan is not None else ())]

    def close(self) -> None:
        """End the processes, and close what is open. Iterating again starts them anew from the current state."""
        pool, self._pool = self._pool, None
        plan, self._plan = self._plan, None
        if pool is not None:
            pool.close()
        if plan is not None:
            plan.close()

    def _batches(self, ahead: deque[dict[str, Any]]) -> Iterator[PackedBatch]:
        """This rank's packs without end as batches, made here or by workers; the state after each step as below."""
        stall_s = stall_limit_s(self._config, chain.from_iterable(source.shards for source in self._sources))
        if self._config.loader.num_workers:
            self._plan = PlanProcess(self._plan_steps, self._state, stall_s)
        self._pool = open_pool(
            self._config,
            lambda watch: PackReader(self._sources, self._config, self._tokenizer, watch),
            self._name_sample,
            self._pin_memory,
            stall_s,
            self._shards_of,
        )
        return batches_of(self._packs_of_rank(ahead), self._pool, self._plan.feed if self._plan is not None else None)

    def _packs_of_rank(self, ahead: deque[dict[str, Any]]) -> Iterator[Pack | None]:
        """This rank's packs without end, None where one is not planned yet; the plan's state after each step is
        appended to `ahead`.
        """
        for step in self._planned_steps():
            if step is None:
                yield None
                continue
            ahead.append(step.state)
            yield from step.packs

    def _planned_steps(self) -> Iterator[PlannedStep | None]:
        """The steps behind the current state, planned here or ahead of need."""
        plan = self._plan
        if plan is None:
            yield from self._plan_steps(self._state)
        else:
            while True:
                yield plan.take()

    def _plan_steps(self, state: dict[str, Any]) -> Iterator[PlannedStep]:
        """The steps behind `state`, without end; all ranks' packs are planned, this rank's given."""
        planner = self._new_planner()
        planner.load_state_dict(state)
        while True:
            packs = [planner.next_pack() for _ in range(self._packs_per_step)]
            after = planner.state_dict()
            if self._cost is not None:
                packs = order_by_cost(packs, self._cost)
            yield PlannedStep(tuple(packs[self._rank :: self._world]), after)

    def _name_sample(self, pack: Pack, number: int) -> tuple[str, str]:
        """(dataset, key) of a pack's sample."""
        item = pack.items[number]
        return self.dataset_names[item.source], self._sources[item.source].key(item.shard, item.row)

    def _shards_of(self, pack: Pack) -> str:
        """The shards of a pack's samples, as an error names them; no file is touched."""
        paths = dict.fromkeys(public_name(self._sources[item.source].shards[item.shard]) for item in pack.items)
        more = f" and {len(paths) - _SHOWN_SHARDS} more" if len(paths) > _SHOWN_SHARDS else ""
        return ", ".join(list(paths)[:_SHOWN_SHARDS]) + more

    def _new_planner(self) -> Planner:
        return new_planner(self._config, self._sources, self._seed, self._cost)

    def _identity(self) -> dict[str, Any]:
        """What decides the plan besides its state."""
        facts = {source.name: (len(source.shards), source.fingerprint) for source in self._sources}
        return identity_of(self._config, self._tokenizer, self._seed, self._cost, facts)


def check_step(config: DataConfig, packs_per_step: int, rank: int, world: int) -> None:
    """Refuse a step that ranks cannot share alike, a rank that takes no part, and a mixture of nothing."""
    if not 0 <= rank < world:
        raise UserError(f"rank={rank} of world={world}: ranks count from 0 to world - 1")
    if packs_per_step % world or packs_per_step < 1:
        raise UserError(
            f"packs_per_step={packs_per_step} is not a multiple of the world size {world}: every rank takes the "
            f"same number of packs; use packs_per_step={-(-max(1, packs_per_step) // world) * world} or other ranks"
        )
    if not config.sources:
        raise UserError("data.sources is empty: name at least one source with its shards")


def stall_limit_s(config: DataConfig, shards: Iterable[str]) -> float:
    """Seconds without a byte of `shards` or another sign of life after which a process counts as stuck.

    A server's retries, which end by themselves, may take longer than a sample may.
    """
    stall_s = STALL_DEADLINES * config.loader.sample_timeout_s
    return max(stall_s, config.remote.longest_s) if any(map(is_remote, shards)) else stall_s


def open_pool(
    config: DataConfig,
    make_reader: Callable[[Callable[[int], None]], PackReader],
    name_sample: NameSample,
    pin_memory: bool,
    stall_s: float,
    name_shards: NameShards = lambda pack: f"pack {pack.number}",
    room: int = 0,
) -> WorkerPool | InProcess:
    """What makes the batches by `config.loader`: workers, or this process; packs bring up to `room` bytes along."""
    settings, size = config.loader, slot_bytes(config.plan.max_tokens, config.plan.max_patches)
    if settings.num_workers == 0:
        return InProcess(make_reader(lambda item: None), pin_memory)
    ahead = packs_ahead(settings.num_workers, settings.prefetch_factor, settings.prefetch_mb, size)
    return WorkerPool(
        lambda watch: make_reader(watch).__getitem__,
        name_sample,
        settings.num_workers,
        ahead,
        size,
        settings.sample_timeout_s,
        stall_s,
        pin_memory,
        name_shards,
        room,
        (settings.prefetch_mb << 20) - ahead * size,
    )


def identity_of(
    config: DataConfig,
    tokenizer: TextTokenizer,
    seed: int,
    cost: PackCost | None,
    sources: Mapping[str, tuple[int, str]],
) -> dict[str, Any]:
    """What decides a plan besides its state; `sources` gives each one's number of shards and their fingerprint."""
    mixture = {name: [source.weight, source.epochs, source.schedule] for name, source in config.sources.items()}
    return {
        "seed": seed,
        "template": config.template,
        "reader": None if config.reader == "index" else config.reader,  # absent in states of runs without it
        "vision_ids": config.vision_ids or None,  # likewise
        "tokenizer": tokenizer.fingerprint,
        **{f"media.{name}": value for name, value in asdict(config.media).items() if name not in _DECODING},
        **{f"plan.{name}": value for name, value in asdict(config.plan).items()},
        "cost": repr(cost) if config.plan.packing == "balanced" else None,
        **{f"{SOURCE}{name}": [*facts, repr(mixture[name])] for name, facts in sources.items()},
    }


def check_identity(state: Mapping[str, Any], mine: Mapping[str, Any], accept_changes: bool) -> list[str]:
    """What differs between `mine` and the identity in `state`.

    Raises:
        UserError: it is not allowed to; with names, values and the remedy.
    """
    if state.get("version") != STATE_VERSION:
        raise UserError(
            f"the plan's state is of version {state.get('version')}, this program continues version {STATE_VERSION}: "
            "finish the stage with the program that began it, or start it anew (resume=none)"
        )
    theirs = state["identity"]
    # Plans number the sources, and draw ties by number.
    common = mine.keys() & theirs.keys()
    mine, theirs = (
        {**identity, _ORDER: [name for name in source_facts(identity) if f"{SOURCE}{name}" in common]}
        for identity in (mine, theirs)
    )
    changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    only_sources = all(name.startswith(SOURCE) or name == _ORDER for name in changed)
    if not changed or (accept_changes and only_sources):
        return changed
    listed = "; ".join(f"{name}: was {theirs.get(name)}, is {mine.get(name)}" for name in changed)
    remedy = ""
    if only_sources:
        how = "data_change=accept (in a program of your own: load_state_dict(..., accept_changes=True))"
        remedy = f", set {how} to go on with the data as it is now"
    raise UserError(
        f"cannot continue the data exactly, the settings differ: {listed}. Restore them{remedy}, or start anew"
    )


def source_facts(identity: Mapping[str, Any]) -> dict[str, SourceFacts]:
    """The sources of a loader's identity, in order."""
    return {key.removeprefix(SOURCE): SourceFacts(*facts) for key, facts in identity.items() if key.startswith(SOURCE)}
