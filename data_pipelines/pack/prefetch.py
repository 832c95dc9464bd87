"""From packs to batches, in order: workers have what they have room for, and only the next batch is waited for.

Enters: packs as they are planned or streamed. Leaves: their batches, each as soon as it is ready: packs behind it that
are not made yet, or have no room yet, go to the workers in a later call, so a stall costs what was prefetched first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipelines.pack.feed import Feed
from data_pipelines.pack.read import PackReader
from data_pipelines.pack.workers import WorkerPool
from data_pipelines.plan.planner import Pack
from data_pipelines.samples import PackedBatch


class InProcess:
    """Makes batches in this process, each when it is asked for; used like `WorkerPool`."""

    def __init__(self, reader: PackReader, pin_memory: bool) -> None:
        self.closed = False
        self._reader, self._pin_memory = reader, pin_memory
        self._pack: Pack | None = None

    @property
    def has_room(self) -> bool:
        """Whether another pack can be submitted before one is taken."""
        return self._pack is None

    @property
    def is_busy(self) -> bool:
        """Whether a pack was submitted and not yet taken."""
        return self._pack is not None

    @property
    def is_next_ready(self) -> bool:
        """Whether `next` may be called: it makes the batch."""
        return self._pack is not None

    def fits(self, pack: Pack) -> bool:
        """Any pack does: it goes through no slot."""
        return self.has_room

    def submit(self, pack: Pack) -> None:
        """Keep `pack` until its batch is asked for."""
        self._pack = pack

    def next(self) -> PackedBatch:
        """The batch of the pack submitted."""
        pack, self._pack = self._pack, None
        assert pack is not None
        batch = self._reader[pack]
        return batch.pin_memory() if self._pin_memory else batch

    def wait(self, also: Any = ()) -> None:
        """Nothing is ever under way."""

    def under_way(self) -> list[str]:
        """Nothing that another thread could tell from the caller's own stack."""
        return []

    def close(self) -> None:
        """Close the reader: files, and the process that decodes clips."""
        self.closed = True
        self._reader.close()


def batches_of(
    packs: Iterator[Pack | None], pool: WorkerPool | InProcess, feed: Feed[Any] | None
) -> Iterator[PackedBatch]:
    """The batches of `packs`, until `pool` is closed. A pack that is None is not made yet: `feed` tells when it is."""
    held: Pack | None = None  # taken, and too large for what the packs under way leave of the pool's memory
    while not pool.closed:
        while pool.has_room and (held := held or next(packs)) is not None and pool.fits(held):
            pool.submit(held)
            held = None
        if pool.is_next_ready:
            yield pool.next()
        elif pool.is_busy:
            pool.wait([feed.pipe] if feed is not None and pool.has_room and held is None else [])
        elif feed is not None:
            feed.wait()
