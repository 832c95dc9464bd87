"""Packs and steps of even cost, so that no micro-step waits long for its slowest rank.

Enters: samples or packs, and a cost function (the model's, passed in: this package knows no model). ZeRO-3 synchronises
every micro-step, so a step lasts the sum over micro-steps of the slowest rank's cost. Two remedies:

- `order_by_cost`: packs of like cost share a micro-step. It changes nothing but the order inside a step, and no other
  assignment of the same packs is shorter: the k-th micro-step's maximum is at least the (k * world)-th largest cost.
- `CostPacker` (`packing: balanced`): packs are composed towards the mean cost, which helps without accumulation too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipelines.plan.shelf import Item, Shelf

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

    Cost counts in whole parts of what a pack of text costs (2^30), so that sums are exact in any unit. State: the open
    items, each with whether it was dear when it came, and the sums of tokens and cost so far.
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
        self._parts = (1 << 30) / (cost.item(Item(0, 0, 0, 0, max_tokens, 0)) or 1.0)
        self._cheap, self._dear = Shelf(max_tokens, max_patches), Shelf(max_tokens, max_patches)
        self._costs: dict[int, int] = {}  # of the open items, by arrival
        self._arrivals = self._sum_tokens = self._sum_cost = 0
        if state:
            self._sum_tokens, self._sum_cost = state["tokens"], state["cost"]
            for dear, *item in state["items"]:
                self._open(Item(*item), self._cost_of(Item(*item)), self._dear if dear else self._cheap)

    def waiting(self) -> Counter[int]:
        """Open items by source."""
        return Counter(item.source for shelf in (self._cheap, self._dear) for item in shelf.items.values())

    def state(self) -> dict[str, Any]:
        """The open items, oldest first, and the running sums."""
        shelves = enumerate((self._cheap, self._dear))
        items = sorted((arrival, dear, *item) for dear, shelf in shelves for arrival, item in shelf.items.items())
        rows = [[dear, *item] for _, dear, *item in items]
        return {"items": rows, "tokens": self._sum_tokens, "cost": self._sum_cost}

    def next_pack(self, source: Iterator[Item]) -> list[Item]:
        """The next pack; `source` refills the pool, each item within budget."""
        cheap, dear = self._cheap, self._dear
        while len(self._costs) < self._pool_size:
            self._draw(source)
        arrival = next(iter(self._costs))
        shelf = cheap if arrival in cheap.items else dear
        pack, tokens, patches, spent = list[Item](), self._max_tokens, self._max_patches, 0
        while True:
            item = shelf.take(arrival)
            spent += self._costs.pop(arrival)
            pack.append(item)
            tokens, patches = tokens - item.tokens, patches - item.patches
            self._draw(source)
            below_mean = spent * self._sum_tokens < self._sum_cost * (self._max_tokens - tokens)
            shelf, other = (dear, cheap) if below_mean else (cheap, dear)
            arrival, another = shelf.best(tokens, patches), other.best(tokens, patches)
            if arrival < 0:
                if another < 0:
                    return pack
                shelf, arrival = other, another
            elif another >= 0:
                # Of two that cost the same by the token, to within a tenth, the longer: where all samples do, packs are
                # as full as the pool's.
                length, longer = shelf.items[arrival].tokens, other.items[another].tokens
                if longer > length:
                    x, y = self._costs[arrival] * longer, self._costs[another] * length
                    if 10 * abs(x - y) <= max(x, y):
                        shelf, arrival = other, another

    def _draw(self, source: Iterator[Item]) -> None:
        item = next(source)
        tokens, cost = item.tokens, self._cost_of(item)
        self._sum_tokens += tokens
        self._sum_cost += cost
        self._open(item, cost, self._dear if cost * self._sum_tokens > self._sum_cost * tokens else self._cheap)

    def _open(self, item: Item, cost: int, shelf: Shelf) -> None:
        shelf.add(self._arrivals, item)
        self._costs[self._arrivals] = cost
        self._arrivals += 1

    def _cost_of(self, item: Item) -> int:
        return int(self._cost.item(item) * self._parts)


def imbalance(costs: npt.NDArray[np.float64]) -> float:
    """Slowest over mean: costs [micro-steps, ranks] → sum over micro-steps of the maximum / of the mean; 1 is ideal."""
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
