"""Which source gives the next sample: the one furthest behind its share.

Enters: weights. Leaves: source numbers, without end. Costs O(log sources) a draw. After n draws every source has given
its share of n to within one sample: no random generator, so no luck in the shares, and nothing but one count per
source to save.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


class Mixture:
    """Draws sources by weight. The k-th sample of a source of share s is due at (k + 1/2) / s; the earliest is drawn.

    State: `drawn`, samples given by each source (ties go to the first source, so nothing else decides).
    """

    def __init__(self, weights: Sequence[float], drawn: Sequence[int] | None = None) -> None:
        if not weights or any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
            raise ValueError(f"weights {list(weights)}: need finite numbers >= 0, at least one above 0")
        total = math.fsum(weights)
        self._step = [total / weight if weight else math.inf for weight in weights]
        self.drawn = [0] * len(weights) if drawn is None else list(drawn)
        if len(self.drawn) != len(weights):
            raise ValueError(f"{len(self.drawn)} counts for {len(weights)} weights")
        # Multiplied anew from the count each time: sums of steps would drift and differ after a resume.
        self._heap = [(self._due(number), number) for number, step in enumerate(self._step) if step < math.inf]
        heapq.heapify(self._heap)

    def draw(self) -> int:
        """The number of the source that gives the next sample."""
        number = self._heap[0][1]
        self.drawn[number] += 1
        heapq.heapreplace(self._heap, (self._due(number), number))
        return number

    def _due(self, number: int) -> float:
        return (self.drawn[number] + 0.5) * self._step[number]
