"""Packs and steps of even cost, so that no micro-step waits long for its slowest rank.

Enters: samples or packs, and a cost function (the model's, passed in: this package knows no model). ZeRO-3 synchronises
every micro-step, so a step lasts the sum over micro-steps of the slowest rank's cost. Two remedies:

- `order_by_cost`: packs of like cost share a micro-step. It changes nothing but the order inside a step, and no other
  assignment of the same packs is shorter: the k-th micro-step's maximum is at least the (k * world)-th largest cost.
- `CostPacker` (`packing: balanced`): packs are composed towards the mean cost, which helps without accumulation too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipelines.plan.packer import ARRIVAL, ORDER_BITS, Item

COST_NAME = "pack_cost.json"  # in a stage's folder: the cost that its packs are dealt by


class Costed(Protocol):
    """Anything with items: a pack."""

    @property
    def number(self) -> int:
        """Its number in the plan."""
        ...

    @property
    def items(self) -> Sequence[Item]:
        """Its samples."""
        ...


AnyPack = TypeVar("AnyPack", bound=Costed)


@dataclass(frozen=True, slots=True)
class PackCost:
    """FLOPs (or any unit) of one forward and backward pass, from lengths: linear in tokens and patches, and in pairs.

    A document of n tokens has n^2 token pairs, a ViT segment (one frame, or pair of frames) of p patches p^2.
    """

    per_token: float
    per_token_pair: float
    per_patch: float
    per_patch_pair: float

    @classmethod
    def of(cls, flops: Callable[[Sequence[int], Sequence[int]], float]) -> PackCost:
        """The coefficients of a model's own count: `flops(document lengths, ViT segment lengths)` of one pack."""
        base = flops((), ())
        token, token_pair = _curve(flops((1024,), ()) - base, flops((2048,), ()) - base, 1024)
        patch, patch_pair = _curve(flops((), (1024,)) - base, flops((), (2048,)) - base, 1024)
        return cls(token, token_pair, patch, patch_pair)

    def item(self, item: Item) -> float:
        """The cost of one sample."""
        return (
            self.per_token * item.tokens
            + self.per_token_pair * item.tokens * item.tokens
            + self.per_patch * item.patches
            + self.per_patch_pair * item.patch_pairs
        )

    def pack(self, pack: Costed) -> float:
        """The cost of a pack: the sum of its samples', since no attention crosses documents."""
        return sum(self.item(item) for item in pack.items)


def _curve(once: float, twice: float, size: int) -> tuple[float, float]:
    """A and b of a * n + b * n^2 through its values at `size` and 2 * `size`."""
    square = (twice - 2 * once) / (2 * size * size)
    return once / size - square * size, square


def order_by_cost(packs: Sequence[AnyPack], cost: PackCost) -> list[AnyPack]:
    """A step's packs, the dearest first, equal ones by number.

    Micro-step m of `world` ranks takes packs [m * world, (m + 1) * world) of this order.
    """
    return sorted(packs, key=lambda pack: (-cost.pack(pack), pack.number))


class CostPacker:
    """A pool packer that steers each pack's cost towards the mean: oldest first, then best fit among samples that are
    dear for their tokens while the pack is cheaper than the mean so far, among cheap ones while it is dearer.

    Cost counts in whole millions, so that sums are exact. State: the open items, each with whether it was dear when it
    came, and the sums of tokens and cost so far.
    """

    def __init__(
        self,
        max_tokens: int,
        max_patches: int,
        pool_size: int,
        cost: PackCost,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._max_tokens, self._max_patches, self._pool_size, self._cost = max_tokens, max_patches, pool_size, cost
        # Arrival number → (item, its cost, whether it is dear); the cheap and the dear by (tokens, arrival).
        self._items: dict[int, tuple[Item, int, bool]] = {}
        self._ranked: tuple[list[int], list[int]] = ([], [])
        self._arrivals = self._sum_tokens = self._sum_cost = 0
        if state:
            self._sum_tokens, self._sum_cost = state["tokens"], state["cost"]
            for dear, *item in state["items"]:
                self._open(Item(*item), bool(dear))

    def waiting(self) -> Counter[int]:
        """Open items by source."""
        return Counter(item.source for item, _, _ in self._items.values())

    def state(self) -> dict[str, Any]:
        """The open items, oldest first, and the running sums."""
        items = [[int(dear), *item] for item, _, dear in self._items.values()]
        return {"items": items, "tokens": self._sum_tokens, "cost": self._sum_cost}

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next pack; `source` refills the pool, each item within budget."""
        while len(self._items) < self._pool_size:
            self._draw(source)
        arrival = next(iter(self._items))
        item, _, dear = self._items[arrival]
        del self._ranked[dear][bisect_left(self._ranked[dear], item.tokens << ORDER_BITS | arrival)]
        tokens, patches, spent = self._max_tokens, self._max_patches, 0
        pack = []
        while True:
            item, cost, _ = self._items.pop(arrival)
            pack.append(item)
            tokens, patches, spent = tokens - item.tokens, patches - item.patches, spent + cost
            self._draw(source)
            chosen = self._choose(
                spent * self._sum_tokens < self._sum_cost * (self._max_tokens - tokens), tokens, patches
            )
            if chosen is None:
                return pack
            arrival = chosen

    def _choose(self, dear: bool, tokens: int, patches: int) -> int | None:
        """Take the best fit of the wanted kind from its list, else of the other; its arrival number.

        Of two that cost alike by the token, the longer: where all samples do, packs are as full as the pool's.
        """
        wanted, other = (self._place(kind, tokens, patches) for kind in (dear, not dear))
        if wanted < 0 and other < 0:
            return None
        if wanted >= 0 and other >= 0:
            mine, theirs = self._ranked[dear][wanted], self._ranked[not dear][other]
            if theirs >> ORDER_BITS > mine >> ORDER_BITS and self._alike(mine & ARRIVAL, theirs & ARRIVAL):
                wanted = -1
        kind, place = (dear, wanted) if wanted >= 0 else (not dear, other)
        return self._ranked[kind].pop(place) & ARRIVAL

    def _place(self, dear: bool, tokens: int, patches: int) -> int:
        """The place of one kind's longest sample that fits; -1 where there is none."""
        ranked = self._ranked[dear]
        place = bisect_left(ranked, (tokens + 1) << ORDER_BITS) - 1
        while place >= 0 and self._items[ranked[place] & ARRIVAL][0].patches > patches:
            place -= 1
        return place

    def _alike(self, one: int, two: int) -> bool:
        """Whether two samples cost the same by the token, to within a tenth."""
        (a, cost_a, _), (b, cost_b, _) = self._items[one], self._items[two]
        x, y = cost_a * b.tokens, cost_b * a.tokens
        return 10 * abs(x - y) <= max(x, y)

    def _draw(self, source: Iterator[Item]) -> None:
        item = next(source)
        cost = self._millions(item)
        self._sum_tokens += item.tokens
        self._sum_cost += cost
        self._open(item, cost * self._sum_tokens > self._sum_cost * item.tokens)

    def _open(self, item: Item, dear: bool) -> None:
        self._items[self._arrivals] = (item, self._millions(item), dear)
        insort(self._ranked[dear], item.tokens << ORDER_BITS | self._arrivals)
        self._arrivals += 1

    def _millions(self, item: Item) -> int:
        return int(self._cost.item(item) * 1e-6)


def imbalance(costs: npt.NDArray[np.float64]) -> float:
    """Slowest over mean: costs [micro-steps, ranks] → sum over micro-steps of the maximum / of the mean; 1 is ideal."""
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
