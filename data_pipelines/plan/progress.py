"""How far a stream is: which shards are done, epoch by epoch, over all ranks.

Enters: the progress at the start of a run and what each rank has done since. Leaves: JSON of each epoch under way, two
or three as a rule. Shards count by their places in the epoch's order, which all ranks read along, so nearly all that
are done lie before the first that is not: they are a number, and only the few behind it take a bit each. Whole epochs
are only counted, and forgotten whenever the ranks compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Epoch → the shards done in it, as bits of an integer, by their places in the epoch's order.
Done = Mapping[int, int]
# A shard done: source, epoch, place.
Ended = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Progress:
    """A source's progress: all epochs before `epoch` are done, of later ones the shards of `done`."""

    epoch: int = 0
    done: Done = field(default_factory=dict)

    def plus(self, ranks: Iterable[Done], num_shards: int) -> Progress:
        """With what the ranks have done since."""
        merged = dict(self.done)
        for rank in ranks:
            for epoch, places in rank.items():
                merged[epoch] = merged.get(epoch, 0) | places
        epoch = self.epoch
        while merged.get(epoch) == (1 << num_shards) - 1:
            del merged[epoch]
            epoch += 1
        return Progress(epoch, merged)

    def since(self, epoch: int) -> Progress:
        """The same without what is known of epochs before `epoch`, which are done."""
        return Progress(epoch, {number: places for number, places in self.done.items() if number >= epoch})

    def to_json(self) -> dict[str, Any]:
        """The state as JSON: each epoch's first place that is not done, and bits of those from it on."""
        return {"epoch": self.epoch, "places": {str(epoch): _cut(done) for epoch, done in self.done.items()}}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """What `to_json` wrote."""
        places = {
            int(epoch): int(rest, 16) << first | (1 << first) - 1 for epoch, (first, rest) in state["places"].items()
        }
        return cls(state["epoch"], places)


def _cut(done: int) -> list[int | str]:
    first = (~done & done + 1).bit_length() - 1
    return [first, f"{done >> first:x}"]


@dataclass(slots=True)
class Tally:
    """What one rank has done since its run began: the shards of each source, and the tokens packed."""

    done: dict[str, dict[int, int]] = field(default_factory=dict)
    tokens: int = 0

    def add(self, ended: Iterable[Ended], tokens: int) -> None:
        """Count a pack or a step."""
        for name, epoch, place in ended:
            epochs = self.done.setdefault(name, {})
            epochs[epoch] = epochs.get(epoch, 0) | 1 << place
        self.tokens += tokens

    def forget(self, name: str, epoch: int) -> None:
        """Drop the epochs before `epoch`: they are done on all ranks."""
        mine = self.done.get(name, {})
        self.done[name] = {number: places for number, places in mine.items() if number >= epoch}

    def copy(self) -> Tally:
        """One that goes on by itself."""
        return Tally({name: dict(epochs) for name, epochs in self.done.items()}, self.tokens)
