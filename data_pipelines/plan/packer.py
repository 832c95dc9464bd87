"""Which samples share a pack: oldest first, then best fit, from a pool of open samples.

Enters: items with their tokens and patches, drawn as needed. Leaves: packs under both budgets. Costs about 1 µs a
sample (`shelf`).

Every pack begins with its pool's oldest item, so no sample waits for more packs than the pool holds items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, Protocol

from data_pipelines.config import MAX_POOL
from data_pipelines.plan.shelf import Item, Shelf


class Packer(Protocol):
    """What the planner needs of a packer. `state` is JSON-able and is all that its next packs depend on."""

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next pack; `source` gives samples, each within budget, as they are needed."""
        ...

    def waiting(self) -> Counter[int]:
        """Samples in the pool by source."""
        ...

    def state(self) -> dict[str, Any]:
        """What a new packer of the same budgets needs to go on."""
        ...


class PoolPacker:
    """Fills packs of at most `max_tokens` and `max_patches` from a pool that is kept at `pool_size` items."""

    def __init__(
        self, max_tokens: int, max_patches: int, pool_size: int, state: Mapping[str, Any] | None = None
    ) -> None:
        self._max_tokens, self._max_patches, self._pool_size = max_tokens, max_patches, pool_size
        self._shelf = Shelf(max_tokens, max_patches)
        self._arrivals = 0
        for item in state["items"] if state else ():
            self.add(Item(*item))

    @property
    def items(self) -> Mapping[int, Item]:
        """The open items by arrival number, oldest first."""
        return self._shelf.items

    def waiting(self) -> Counter[int]:
        """Open items by source."""
        return Counter(item.source for item in self.items.values())

    def state(self) -> dict[str, Any]:
        """The open items, oldest first."""
        return {"items": [list(item) for item in self.items.values()]}

    def add(self, item: Item) -> None:
        """Open one item."""
        self._shelf.add(self._arrivals, item)
        self._arrivals += 1

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next pack, the oldest item first. `source` refills the pool after each."""
        shelf = self._shelf
        while len(shelf.items) < self._pool_size:
            self.add(next(source))
        pack, tokens, patches = list[Item](), self._max_tokens, self._max_patches
        arrival = next(iter(shelf.items))
        while arrival >= 0:
            item = shelf.take(arrival)
            pack.append(item)
            tokens, patches = tokens - item.tokens, patches - item.patches
            shelf.add(self._arrivals, next(source))  # not `add`: this is the planner's inner loop
            self._arrivals += 1
            arrival = shelf.best(tokens, patches)
        return pack


class TaskPacker:
    """Packs of one task kind each: a pool per kind, and the kind whose pool is ready gives the next pack.

    A pool is ready with `pool_size` items and 1.5 packs' worth of tokens. A rare kind's pool that has not got
    so far gives what it has as soon as its oldest sample has waited for 64 x `pool_size` drawn ones; in a pack that is
    made anyway, those that waited for 8 x `pool_size` go first. Where all pools together hold `MAX_POOL` items (of many
    kinds), the one with the most tokens gives a pack.
    """

    def __init__(
        self, max_tokens: int, max_patches: int, pool_size: int, state: Mapping[str, Any] | None = None
    ) -> None:
        self._max_tokens, self._max_patches = max_tokens, max_patches
        self._num_open = 0
        self._ready_items, self._ready_tokens = pool_size, max_tokens + max_tokens // 2
        self._aged, self._patience = 8 * pool_size, 64 * pool_size
        self._shelves: dict[int, Shelf] = {}
        self._held: dict[int, int] = {}  # tokens on each shelf
        self._waiting = Counter[int]()
        open_items = state["items"] if state else []
        self._drawn = open_items[0][0] if open_items else 0
        for age, *item in open_items:
            self._add(self._drawn - age, Item(*item))

    def waiting(self) -> Counter[int]:
        """Open items by source."""
        return self._waiting

    def state(self) -> dict[str, Any]:
        """The open items by age in drawn samples: [age, *item], oldest first."""
        open_items = [pair for shelf in self._shelves.values() for pair in shelf.items.items()]
        return {"items": [[self._drawn - arrival, *item] for arrival, item in sorted(open_items)]}

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next pack, of the kind whose oldest sample waited too long, else of the first kind that gets ready."""
        task = self._draw_until_ready(source)
        pack = self._drain(self._shelves[task])
        self._held[task] -= sum(item.tokens for item in pack)
        self._num_open -= len(pack)
        self._waiting.subtract(item.source for item in pack)
        return pack

    def _draw_until_ready(self, source: Iterator[Item]) -> int:
        oldest = min((next(iter(shelf.items)) for shelf in self._shelves.values() if shelf.items), default=self._drawn)
        while self._drawn - oldest < self._patience:
            if self._num_open >= MAX_POOL:
                return max(self._held, key=self._held.__getitem__)
            item = next(source)
            shelf = self._add(self._drawn, item)
            self._drawn += 1
            if len(shelf.items) >= self._ready_items and self._held[item.task] >= self._ready_tokens:
                return item.task
        return next(task for task, shelf in self._shelves.items() if oldest in shelf.items)

    def _add(self, arrival: int, item: Item) -> Shelf:
        task = item.task
        if task not in self._shelves:
            self._shelves[task], self._held[task] = Shelf(self._max_tokens, self._max_patches), 0
        shelf = self._shelves[task]
        shelf.add(arrival, item)
        self._held[task] += item.tokens
        self._num_open += 1
        self._waiting[item.source] += 1
        return shelf

    def _drain(self, shelf: Shelf) -> list[Item]:
        """A pack of what is there: the oldest item, those that waited for long, then best fit.

        Best fit alone takes the longest that fit. On a shelf that fills between its packs, not while they are made, the
        short ones would pile up and wait without an end.
        """
        pack, tokens, patches = list[Item](), self._max_tokens, self._max_patches
        aged = self._drawn - self._aged
        first = list(takewhile(lambda arrival: arrival < aged, shelf.items)) or [next(iter(shelf.items))]
        for arrival in first:
            item = shelf.items[arrival]
            if item.tokens <= tokens and item.patches <= patches:
                pack.append(shelf.take(arrival))
                tokens, patches = tokens - item.tokens, patches - item.patches
                if shelf.best(tokens, patches) < 0:
                    break
        while (arrival := shelf.best(tokens, patches)) >= 0:
            item = shelf.take(arrival)
            pack.append(item)
            tokens, patches = tokens - item.tokens, patches - item.patches
        return pack


class SinglePacker:
    """Every document alone: no packing, for comparison."""

    def waiting(self) -> Counter[int]:
        """Nothing waits."""
        return Counter()

    def state(self) -> dict[str, Any]:
        """Nothing is kept open."""
        return {}

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next sample."""
        return [next(source)]
