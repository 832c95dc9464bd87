"""Open samples by size: which of them fills a pack best, found without looking at the others.

Enters: samples by arrival number, of which none stands twice. Leaves: the arrival number of the best fit under both
budgets. Costs about 1 µs a sample to add, find and take: two sorted lists, searched by bisection.

A sample stands on the list of the budget of which it takes the larger share. So whatever fits that budget nearly always
fits the other; only what takes much of both (a large picture under a long text) may have to be stepped over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

_ORDER_BITS = 44
_ARRIVAL = (1 << _ORDER_BITS) - 1


class Item(NamedTuple):
    """A sample in the plan: where it is, in which of its source's epochs, and what it takes.

    `patch_pairs` sums p^2 over its ViT segments of p patches; `task` numbers its kind where packs keep kinds apart.
    """

    source: int
    shard: int
    row: int
    epoch: int
    tokens: int
    patches: int
    patch_pairs: int = 0
    task: int = 0


class Shelf:
    """Samples that wait for a pack of at most `max_tokens` and `max_patches`. `items` are in order of arrival."""

    def __init__(self, max_tokens: int, max_patches: int) -> None:
        self.items: dict[int, Item] = {}
        self._max_tokens, self._max_patches = max_tokens, max_patches
        # (tokens or patches, arrival) as one sortable integer
        self._by_tokens: list[int] = []
        self._by_patches: list[int] = []

    def add(self, arrival: int, item: Item) -> None:
        """Put `item` on the shelf; arrival numbers rise."""
        self.items[arrival] = item
        if item.patches * self._max_tokens > item.tokens * self._max_patches:
            insort(self._by_patches, item.patches << _ORDER_BITS | arrival)
        else:
            insort(self._by_tokens, item.tokens << _ORDER_BITS | arrival)

    def take(self, arrival: int) -> Item:
        """Remove the item that arrived as number `arrival`."""
        item = self.items.pop(arrival)
        if item.patches * self._max_tokens > item.tokens * self._max_patches:
            del self._by_patches[bisect_left(self._by_patches, item.patches << _ORDER_BITS | arrival)]
        else:
            del self._by_tokens[bisect_left(self._by_tokens, item.tokens << _ORDER_BITS | arrival)]
        return item

    def best(self, tokens: int, patches: int) -> int:
        """The arrival number of the largest item, by its larger share, that fits `tokens` and `patches`; -1: none."""
        items, ranked = self.items, self._by_tokens
        place = bisect_left(ranked, (tokens + 1) << _ORDER_BITS) - 1
        while place >= 0 and items[ranked[place] & _ARRIVAL].patches > patches:
            place -= 1
        longest = ranked[place] & _ARRIVAL if place >= 0 else -1
        if not self._by_patches:  # no budget of patches that could bind, or no media
            return longest
        ranked = self._by_patches
        place = bisect_left(ranked, (patches + 1) << _ORDER_BITS) - 1
        while place >= 0 and items[ranked[place] & _ARRIVAL].tokens > tokens:
            place -= 1
        if place < 0:
            return longest
        largest = ranked[place] & _ARRIVAL
        if longest < 0 or items[largest].patches * self._max_tokens > items[longest].tokens * self._max_patches:
            return largest
        return longest
