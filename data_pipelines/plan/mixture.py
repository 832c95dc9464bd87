"""Which source gives the next sample: the one furthest behind its share.

Enters: weights, and what waits for a pack. Leaves: source numbers, without end. Costs about 0.1 µs a draw, made some
hundreds at a time. After n draws every source has given its share of n to within one sample, plus its lead: no random
generator, so no luck in the shares, and nothing but two numbers per source to save.

The lead makes up for the packer. A source of long samples waits in the pool while short ones fill the gaps, so that
exact shares of the draws gave shares of the packs that were 4 points off after 1,000 packs (texts and clips by halves).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipelines.config import SourceConfig
from data_pipelines.errors import UserError

_CHUNK = 512
# How much of a source's surplus in the pool is drawn in advance. All of it would be a loop that never settles: more
# draws, more surplus; at 0.9 shares of packs stray a tenth of what they did.
_LEAD = 0.9


@dataclass(frozen=True, slots=True)
class Phase:
    """From `from_tokens` planned tokens on, `weights` [sources] decide the shares."""

    from_tokens: float
    weights: tuple[float, ...]


def mixture_phases(
    sources: Sequence[SourceConfig], sizes: Callable[[], Sequence[int]], temperature: float | None = None
) -> tuple[Phase, ...]:
    """The weights of all sources over training. `sizes` gives the sources' sample counts, called only if they matter.

    Raises:
        UserError: some sources state epochs and others weights, or no source has a weight in some phase.
    """
    counted = [source.epochs is not None for source in sources]
    if any(counted) and not all(counted):
        raise UserError("some sources state epochs and others do not: state epochs for all, or weights for all")
    scale: Sequence[float] = [1.0] * len(sources)
    if all(counted):
        scale = [(source.epochs or 0.0) * size for source, size in zip(sources, sizes(), strict=True)]
    elif temperature is not None:
        counts = sizes()
        largest = max(counts, default=0)  # relative to it: powers of the counts themselves overflow at low temperatures
        scale = [(size / largest) ** (1 / temperature) if largest else 0.0 for size in counts]
    phases = []
    for start in sorted({0.0, *(tokens for source in sources for tokens, _ in source.schedule)}):
        weights = [
            next((weight for tokens, weight in reversed(source.schedule) if tokens <= start), source.weight)
            for source in sources
        ]
        phases.append(Phase(start, tuple(w * s for w, s in zip(weights, scale, strict=True))))
        Mixture(phases[-1].weights)  # refuses impossible weights here, not after a billion tokens
    return tuple(phases)


def shares_at(phases: Sequence[Phase], tokens: float) -> tuple[float, ...]:
    """The share of samples [sources], adding up to 1, that each source is to give once `tokens` are planned."""
    weights = next(phase.weights for phase in reversed(phases) if phase.from_tokens <= tokens)
    return tuple(weight / math.fsum(weights) for weight in weights)


class Mixture:
    """Draws sources by weight. The k-th sample of a source of share s is due at (k + 1/2 - lead) / s; the earliest is
    drawn.

    State: `drawn`, samples given by each source, and `leads` (ties go to the first source, so nothing else decides).
    """

    def __init__(
        self, weights: Sequence[float], drawn: Sequence[int] | None = None, leads: Sequence[float] | None = None
    ) -> None:
        if not weights or any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
            raise UserError(f"weights {list(weights)}: need finite numbers >= 0, at least one above 0")
        self.drawn = [0] * len(weights) if drawn is None else list(drawn)
        self.leads = [0.0] * len(weights) if leads is None else list(leads)
        if not len(self.drawn) == len(self.leads) == len(weights):
            raise UserError(f"{len(self.drawn)} counts and {len(self.leads)} leads for {len(weights)} weights")
        total = math.fsum(weights)
        self._shares = [weight / total for weight in weights]

    def make_up_for(self, waiting: Mapping[int, int]) -> bool:
        """Lead by how much more of a source waits for a pack than its share of what waits (source → samples).

        Whether the leads changed: then the draws need a new iterator.
        """
        before, total = self.leads, sum(waiting.values())
        self.leads = [_LEAD * (waiting.get(number, 0) - share * total) for number, share in enumerate(self._shares)]
        return self.leads != before

    def draws(self) -> Iterator[int]:
        """The numbers of the sources that give the next samples; `drawn` counts what was taken from the iterator."""
        drawn = self.drawn
        while True:
            for number in self._next_chunk().tolist():
                drawn[number] += 1
                yield number

    def _next_chunk(self) -> npt.NDArray[np.int64]:
        """The next draws, all that are due within some hundred: the due times of every source, merged."""
        # Multiplied anew from the count: a sum of steps would drift and differ after a resume.
        dues = {
            number: (drawn + 0.5 - lead) / share
            for number, (share, drawn, lead) in enumerate(zip(self._shares, self.drawn, self.leads, strict=True))
            if share > 0
        }
        limit = min(dues.values()) + _CHUNK
        numbers, times = [], []
        for number, first in dues.items():
            share, drawn, lead = self._shares[number], self.drawn[number], self.leads[number]
            count = max(0, math.ceil((limit - first) * share) + 1)
            due = (np.arange(drawn, drawn + count) + 0.5 - lead) / share
            due = due[due <= limit]
            times.append(due)
            numbers.append(np.full(len(due), number))
        # Sources stand in order and the sort is stable: ties go to the first source.
        return np.concatenate(numbers)[np.argsort(np.concatenate(times), kind="stable")]
