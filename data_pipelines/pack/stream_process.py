"""Streamed packs from a process of their own, so that reading and counting run beside training.

Enters: what makes a `StreamPlanner`. Leaves: its packs. Costs a copy of each pack's stored bytes, and holds a pack, and
64 MiB of packs, ahead. A process that died is replaced, as is one that hangs while it is waited for (no byte of a shard
read, no sample begun): the new one reads the shards that were under way again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from data_pipelines.pack.feed import Feed, Watch
from data_pipelines.plan.stream import StreamedPack, StreamPlanner
from data_pipelines.samples import LedgerEvent

# Called in the process, which is forked: it begins behind the packs that its parent has got so far.
MakePlanner = Callable[[Watch], StreamPlanner]
_AHEAD_BYTES = 64 << 20  # several ordinary packs, so that what a stall used up is made again while training computes


class StreamProcess:
    """Packs of the planner that `make_planner` makes in a process of its own.

    Raises (from `take`):
        UserError: as the planner. RuntimeError: a defect, with its traceback; deaths without a pack.
        ShardError: no sign of life in `stall_s`, twice without a pack between, with the shard it was at.
    """

    def __init__(self, make_planner: MakePlanner, stall_s: float) -> None:
        def packs(watch: Watch) -> Iterator[StreamedPack]:
            planner = make_planner(watch)
            while True:
                yield planner.next_pack()

        self.feed = Feed(packs, "data-stream", "streams the shards", stall_s, _AHEAD_BYTES)

    def take(self) -> StreamedPack | None:
        """The next pack, with an event (without a key) for each process that ended; None: it is not made yet."""
        taken = self.feed.take()
        if taken is None:
            return None
        pack, ends = taken
        message = "the process that streams the shards {}; those under way are read again"
        notes = [LedgerEvent("", "", "worker_replaced", message.format(end)) for end in ends]
        return replace(pack, events=(*notes, *pack.events))

    def close(self) -> None:
        """End the process."""
        self.feed.close()
