"""Which samples share a pack: oldest first, then best fit, from a pool of open samples.

Enters: items with their tokens and patches, drawn as needed. Leaves: packs under both budgets. Costs about 1 µs a
sample: the pool is kept sorted by length and searched by bisection. No item waits for more packs than the pool holds,
because each pack begins with the oldest.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ORDER_BITS = 44
_ARRIVAL = (1 << _ORDER_BITS) - 1


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

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next pack, the oldest item first. `source` refills the pool, each item within budget."""
        # Written out in one loop: this is the planner's inner loop, half of its time.
        items, ranked, arrivals = self._items, self._sorted, self._arrivals
        while len(items) < self._pool_size:
            self._add(next(source))
            arrivals = self._arrivals
        arrival = next(iter(items))
        del ranked[bisect_left(ranked, items[arrival].tokens << _ORDER_BITS | arrival)]
        tokens, patches = self._max_tokens, self._max_patches
        pack = []
        while True:
            item = items.pop(arrival)
            pack.append(item)
            tokens -= item.tokens
            patches -= item.patches
            item = next(source)
            items[arrivals] = item
            insort(ranked, item.tokens << _ORDER_BITS | arrivals)
            arrivals += 1
            # The longest item that fits the tokens left, then the next shorter until the patches fit too.
            place = bisect_left(ranked, (tokens + 1) << _ORDER_BITS) - 1
            while place >= 0 and items[ranked[place] & _ARRIVAL].patches > patches:
                place -= 1
            if place < 0:
                self._arrivals = arrivals
                return pack
            arrival = ranked.pop(place) & _ARRIVAL

    def _add(self, item: Item) -> None:
        self._items[self._arrivals] = item
        insort(self._sorted, item.tokens << _ORDER_BITS | self._arrivals)
        self._arrivals += 1
