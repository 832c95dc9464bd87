"""Streamed packs from a process of their own, so that reading and counting run beside training.

Enters: what makes a `StreamPlanner`. Leaves: its packs. Costs a copy of each pack's stored bytes, and holds one pack
ahead. A process that died is replaced: it reads the shards that were under way again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from data_pipelines.pack.feed import Feed
from data_pipelines.plan.stream import StreamedPack, StreamPlanner
from data_pipelines.samples import LedgerEvent

# Called in the process, which is forked: it begins behind the packs that its parent has got so far.
MakePlanner = Callable[[], StreamPlanner]


class StreamProcess:
    """Packs of the planner that `make_planner` makes in a process of its own.

    Raises (from `next_pack`):
        UserError: as the planner. RuntimeError: a defect, with its traceback; deaths without a pack.
    """

    def __init__(self, make_planner: MakePlanner) -> None:
        def packs() -> Iterator[StreamedPack]:
            planner = make_planner()
            while True:
                yield planner.next_pack()

        self._number = 0
        self.feed = Feed(packs, "data-stream", "streams the shards")

    def next_pack(self) -> StreamedPack:
        """The next pack; waits for it."""
        pack, deaths = self.feed.next()
        message = "the process that streams the shards died (exit {}); those under way are read again"
        notes = [LedgerEvent("", f"pack {self._number}", "worker_replaced", message.format(code)) for code in deaths]
        self._number += 1
        return replace(pack, number=self._number - 1, events=(*notes, *pack.events))

    def close(self) -> None:
        """End the process."""
        self.feed.close()
