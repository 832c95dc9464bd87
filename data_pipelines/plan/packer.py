"""Which samples share a pack: oldest first, then best fit, from a pool of open samples.

Enters: items with their tokens and patches, drawn as needed. Leaves: packs under both budgets. Costs about 1 µs a
sample: the pool is kept sorted by length and searched by bisection. No item waits for more packs than the pool holds,
because each pack begins with the oldest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

_ORDER_BITS = 44


class Item(NamedTuple):
    """A sample in the plan: where it is, in which of its source's epochs, and what it takes."""

    source: int
    shard: int
    row: int
    epoch: int
    tokens: int
    patches: int


class PoolPacker:
    """Fills packs of at most `max_tokens` and `max_patches` from a pool that is kept at `pool_size` items.

    State: the pool's items, oldest first.
    """

    def __init__(self, max_tokens: int, max_patches: int, pool_size: int, pool: Sequence[Item] = ()) -> None:
        self._max_tokens, self._max_patches, self._pool_size = max_tokens, max_patches, pool_size
        # Arrival number → item, in order of arrival; and (tokens, arrival) as one sortable integer.
        self._items: dict[int, Item] = {}
        self._sorted: list[int] = []
        self._arrivals = 0
        for item in pool:
            self._add(item)

    @property
    def pool(self) -> tuple[Item, ...]:
        """The open items, oldest first."""
        return tuple(self._items.values())

    def next_pack(self, draw: Callable[[], Item]) -> list[Item]:
        """The next pack, the oldest item first. `draw` refills the pool, each item within budget."""
        while len(self._items) < self._pool_size:
            self._add(draw())
        oldest = next(iter(self._items))
        pack = [self._take(self._place(oldest))]
        tokens, patches = self._max_tokens - pack[0].tokens, self._max_patches - pack[0].patches
        while True:
            self._add(draw())
            place = self._best_fit(tokens, patches)
            if place < 0:
                return pack
            item = self._take(place)
            pack.append(item)
            tokens, patches = tokens - item.tokens, patches - item.patches

    def _best_fit(self, tokens: int, patches: int) -> int:
        """The place of the longest item within both budgets, -1 if there is none."""
        place = bisect_left(self._sorted, (tokens + 1) << _ORDER_BITS) - 1
        while place >= 0 and self._items[self._arrival(place)].patches > patches:
            place -= 1
        return place

    def _add(self, item: Item) -> None:
        assert item.tokens <= self._max_tokens
        assert item.patches <= self._max_patches
        self._items[self._arrivals] = item
        insort(self._sorted, item.tokens << _ORDER_BITS | self._arrivals)
        self._arrivals += 1

    def _take(self, place: int) -> Item:
        arrival = self._arrival(place)
        del self._sorted[place]
        return self._items.pop(arrival)

    def _place(self, arrival: int) -> int:
        return bisect_left(self._sorted, self._items[arrival].tokens << _ORDER_BITS | arrival)

    def _arrival(self, place: int) -> int:
        return self._sorted[place] & ((1 << _ORDER_BITS) - 1)
