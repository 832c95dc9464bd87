"""The plan: a numbered, endless sequence of packs, the same on every rank, for every world size and worker count.

Enters: the sources' indices and the seed; never a pixel or a text. Leaves: packs of (source, shard, row), numbered from
0. Costs a few µs a sample. What it reads decides nothing but lengths, so a pack number means the same samples for ever.

    order (per source) → mixture → lengths → packer → Pack 0, Pack 1, ...

State: a small JSON-able dict: per source the place in its order, per source the samples drawn, the pool's items, and
the number of the next pack. It grows with the pool and the number of sources, never with the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import length_hint
from typing import Any

import numpy as np

from data_pipelines.config import MediaConfig, PlanConfig
from data_pipelines.errors import ShardError, UserError
from data_pipelines.index.source import ShardTable, SourceIndex
from data_pipelines.plan.balance import CostPacker, PackCost
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.plan.mixture import Mixture, Phase
from data_pipelines.plan.order import SourceOrder
from data_pipelines.plan.packer import Packer, PoolPacker, SinglePacker, TaskPacker
from data_pipelines.plan.rows import fold, unfold
from data_pipelines.plan.shelf import Item
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.names import public_name

_PACKS_PER_LOOK = 16  # how often the mixture looks at what waits in the pool


@dataclass(frozen=True, slots=True)
class Pack:
    """Pack `number`: its samples, what they take together, and what was found unusable while it was planned.

    `skipped` (place in items, reason, message) are samples that reading must leave out: they ended or stalled a worker.
    """

    number: int
    items: tuple[Item, ...]
    num_tokens: int
    num_patches: int
    events: tuple[LedgerEvent, ...] = ()
    skipped: tuple[tuple[int, str, str], ...] = ()

    @property
    def stored_bytes(self) -> int:
        """How many bytes of samples it brings along: none, they are read where they lie."""
        return 0


class Planner:
    """Makes packs one after the other. `number` is that of the next pack, `tokens` how many the packs so far hold.

    `phases` are the mixture's weights over training.

    Raises (from `next_pack` too):
        ShardError: a source without one usable sample, with the reasons.
    """

    def __init__(
        self,
        sources: Sequence[SourceIndex],
        phases: Sequence[Phase],
        media: MediaConfig,
        plan: PlanConfig,
        seed: int,
        cost: PackCost | None = None,
    ) -> None:
        self.number = self.tokens = 0
        self.phases, self._plan, self._cost = phases, plan, cost
        self._phase = 0
        self._mixture = Mixture(phases[0].weights)
        self._packer = new_packer(plan, None, cost)
        self._shared = _Shared([], {} if plan.packing == "task" else None)
        self._cursors = [
            _Cursor(number, source, media, plan, seed, self._shared) for number, source in enumerate(sources)
        ]
        self._items = self._draw_items()

    def next_pack(self) -> Pack:
        """The pack `number`; the number advances."""
        if self._phase + 1 < len(self.phases) and self.tokens >= self.phases[self._phase + 1].from_tokens:
            self._phase += 1
            self._count_anew()
        elif self.number % _PACKS_PER_LOOK == 0 and self._mixture.make_up_for(self._packer.waiting()):
            self._items = self._draw_items()
        items = self._packer.next_pack(self._items)
        events, self._shared.events[:] = tuple(self._shared.events), []
        tokens, patches = sum(item.tokens for item in items), sum(item.patches for item in items)
        self.number += 1
        self.tokens += tokens
        return Pack(self.number - 1, tuple(items), tokens, patches, events)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the next pack; JSON keeps it exactly."""
        return {
            "number": self.number,
            "tokens": self.tokens,
            "phase": self._phase,
            "drawn": list(self._mixture.drawn),
            "leads": list(self._mixture.leads),
            "cursors": [cursor.state_dict() for cursor in self._cursors],
            "tasks": list(self._shared.tasks or ()),
            "pool": _folded(self._packer.state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the same sources, budgets and seed are the caller's to check.

        Raises:
            UserError: samples take something else than when they were planned: another version counted them.
        """
        self.number, self.tokens, self._phase = state["number"], state["tokens"], state["phase"]
        self._mixture = Mixture(self.phases[self._phase].weights, state["drawn"], state["leads"])
        if self._shared.tasks is not None:
            self._shared.tasks.clear()
            self._shared.tasks.update({task: number for number, task in enumerate(state["tasks"])})
        for cursor, place in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(place)
        pool = _unfolded(state["pool"])
        self._check_counts([Item(*row[-len(Item._fields) :]) for row in pool.get("items", ())])
        self._shared.events.clear()  # told when the blocks were opened first
        self._items = self._draw_items()
        self._packer = new_packer(self._plan, pool, self._cost)

    def _check_counts(self, waiting: Sequence[Item]) -> None:
        """Measure the samples that wait for a pack again: the state holds what they took."""
        places: dict[tuple[int, int], list[Item]] = {}
        for item in waiting:
            places.setdefault((item.source, item.shard), []).append(item)
        for (source, shard), items in places.items():
            self._cursors[source].check_counts(shard, items)

    def _count_anew(self) -> None:
        """Shares of other weights: what waits counts as drawn, so that the packs from here on have them."""
        waiting = self._packer.waiting()
        weights = self.phases[self._phase].weights
        self._mixture = Mixture(weights, [waiting[number] for number in range(len(weights))])
        self._mixture.make_up_for(waiting)
        self._items = self._draw_items()

    def _draw_items(self) -> Iterator[Item]:
        """The samples in the order in which they enter the pool; its place is that of the mixture and the cursors."""
        cursors = self._cursors
        for number in self._mixture.draws():
            cursor = cursors[number]
            item = next(cursor.items, None)
            while item is None:
                cursor.refill()
                item = next(cursor.items, None)
            yield item


def _folded(pool: dict[str, Any]) -> dict[str, Any]:
    """A packer's state as it is saved: its open samples as text, which keeps the whole under 64 KB for large pools."""
    return {**pool, "items": fold(pool["items"])} if "items" in pool else pool


def _unfolded(pool: dict[str, Any]) -> dict[str, Any]:
    """A saved packer's state with its open samples as rows."""
    return {**pool, "items": unfold(pool["items"])} if "items" in pool else pool


def new_packer(plan: PlanConfig, state: Mapping[str, Any] | None, cost: PackCost | None) -> Packer:
    """The packer that `plan` names, going on from `state`; `cost` is needed for balanced packing."""
    budgets = (plan.max_tokens, plan.max_patches, plan.pool_size)
    if plan.packing == "single":
        return SinglePacker()
    if plan.packing == "task":
        return TaskPacker(*budgets, state)
    if plan.packing == "pool":
        return PoolPacker(*budgets, state)
    if cost is None:
        raise UserError("plan.packing=balanced needs the model's cost (PackLoader's argument `cost`); or use pool")
    return CostPacker(*budgets, cost, state)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the cursors of a plan share: events not yet told; task kinds numbered as they appear (None: all alike)."""

    events: list[LedgerEvent]
    tasks: dict[str, int] | None


class _Cursor:
    """A place in one source: the open block and the next sample in it.

    State: where the open block stands in the source's order, and how many of its usable samples were drawn.
    """

    def __init__(
        self,
        number: int,
        source: SourceIndex,
        media: MediaConfig,
        plan: PlanConfig,
        seed: int,
        shared: _Shared,
    ) -> None:
        self._number, self._source, self._media, self._plan = number, source, media, plan
        self._events, self._tasks = shared.events, shared.tasks
        self._order = SourceOrder(
            seed,
            source.name,
            source.num_shards,
            self._shard_size,
            plan.block_size,
            plan.window_shards,
            entered=self._report_shards,
        )
        self._place = self._order.place
        self._size: int | None = None
        self.items: Iterator[Item] = iter(())

    def refill(self) -> None:
        """Open blocks until one has a usable sample."""
        first_epoch = self._order.place[0]
        while not self._open_block():
            if self._order.place[0] > first_epoch + 1:
                raise nothing_usable(self._source.name, self._events)

    def state_dict(self) -> dict[str, Any]:
        drawn = None if self._size is None else self._size - length_hint(self.items)
        return {"place": list(self._place), "next": drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        epoch, window, block = state["place"]
        self._order.place = self._place = (epoch, window, block)
        self._size, self.items = None, iter(())
        if state["next"] is not None:
            if self._open_block() < state["next"]:
                raise self._counted_otherwise(f"a block has {self._size} usable samples, not {state['next']} or more")
            for _ in range(state["next"]):
                next(self.items)

    def check_counts(self, shard: int, items: Sequence[Item]) -> None:
        """Refuse `items` of a shard that take something else now than when they were drawn."""
        table, rows = self._source.table(shard), np.array([item.row for item in items])
        lengths, _ = sample_lengths(self._source.name, table, rows, self._media, self._plan)
        for item, tokens, patches in zip(items, lengths.tokens.tolist(), lengths.patches.tolist(), strict=True):
            if (tokens, patches) != (item.tokens, item.patches):
                raise self._counted_otherwise(
                    f"{table.index.key(item.row)} takes {tokens} tokens and {patches} patches, not {item.tokens} and "
                    f"{item.patches}"
                )

    def _open_block(self) -> int:
        """Make the next block's usable samples the `items`; their number."""
        self._place = self._order.place
        try:
            block = self._order.next_block()
        except ShardError:
            raise  # a shard that cannot be opened, told as such
        except UserError as error:
            raise nothing_usable(self._source.name, self._events) from error
        table = self._source.table(block.shard)
        lengths, events = sample_lengths(self._source.name, table, block.rows, self._media, self._plan)
        self._events += events
        usable = lengths.tokens > 0
        rows = block.rows[usable].tolist()
        columns = (lengths.tokens, lengths.patches, lengths.patch_pairs)
        counts = (column[usable].tolist() for column in columns)
        places = repeat(self._number), repeat(block.shard), rows, repeat(block.epoch)
        items = list(map(Item._make, zip(*places, *counts, self._task_numbers(table, rows), strict=False)))
        self._size, self.items = len(items), iter(items)
        return self._size

    def _task_numbers(self, table: ShardTable, rows: Sequence[int]) -> list[int]:
        tasks = self._tasks
        if tasks is None:
            return [0] * len(rows)
        index, kinds = table.index, table.index.arrays["task"][rows].tolist()
        numbers = {kind: tasks.setdefault(index.task_name(kind), len(tasks)) for kind in dict.fromkeys(kinds)}
        return [numbers[kind] for kind in kinds]

    def _shard_size(self, shard: int) -> int:
        return self._source.table(shard).index.num_samples

    def _report_shards(self, shards: Sequence[int]) -> None:
        """Tell, once an epoch, what the index left out of the shards that come into use."""
        for shard in shards:
            table, name = self._source.table(shard), self._source.name
            for key, reason, message in table.problems:
                self._events.append(LedgerEvent(name, key, reason, message, indexed=True))
            for reason, count in table.unlisted.items():
                message = f"{count} more samples, not listed one by one"
                key = public_name(self._source.shards[shard])
                self._events.append(LedgerEvent(name, key, reason, message, indexed=True, num_samples=count))

    def _counted_otherwise(self, what: str) -> UserError:
        return UserError(
            f"source {self._source.name!r}: {what} as the plan's state says, which another version of this program "
            "wrote: finish the stage with that one, or start it anew (resume=none)"
        )


def nothing_usable(source: str, events: Sequence[LedgerEvent]) -> ShardError:
    """The error of a source without one usable sample: the most frequent reasons, and what one of them says.

    It is known for sure after more than an epoch, so `events` tell many samples twice; alike ones count once.
    """
    mine = list(dict.fromkeys(event for event in events if event.dataset == source))
    reasons = Counter[str]()
    for event in mine:
        reasons[event.reason] += event.num_samples
    listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5)) or "the shards are empty"
    example = mine[0].message if mine else ""
    return ShardError(source, "empty_source", f"source {source!r} has no usable sample: {listed}. {example}".strip())
