"""Which rank takes which pack of a step, so that no micro-step waits long for its slowest rank.

Enters: a step's packs and a cost function (the model's, passed in: this package knows no model). Leaves: the same packs
in another order. Costs a sort per step. ZeRO-3 synchronises every micro-step, so a step lasts the sum over micro-steps
of the slowest rank's cost: packs of like cost belong into the same micro-step. Sorting by cost does that, and no other
assignment of the same packs is shorter: the k-th micro-step's maximum is at least the (k * world)-th largest cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from data_pipelines.plan.packer import Item


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


def imbalance(costs: npt.NDArray[np.float64]) -> float:
    """Slowest over mean: costs [micro-steps, ranks] → sum over micro-steps of the maximum / of the mean; 1 is ideal."""
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())
