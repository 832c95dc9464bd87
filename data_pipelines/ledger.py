"""The ledger: everything that was dropped, shrunk or cut, one JSON line each.

Enters: consumed packs with their events. Leaves: lines {"pack", "dataset", "key", "reason", "message"} appended to a
file; "samples" where a line stands for several. Costs nothing for packs without events. A run that is resumed drops
the lines of packs that it trains again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.samples import PackedBatch
from data_pipelines.whole import append_lines

_LOG = logging.getLogger(__name__)
# Events that cost no sample: something was noted or made smaller, the sample is in its pack.
LOSSLESS = frozenset({"shrunk", "truncated", "no_end_marker", "worker_replaced", "scattered_key"})


class Ledger:
    """Appends to the file at `path`, which is made with the first line.

    Where the disk has no room, that is said once and the lines are lost: the counts in the figures still hold them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told_of_disk = False

    def add(self, packs: Iterable[PackedBatch]) -> None:
        """Write down what `packs` report."""
        lines = []
        for pack in packs:
            for event in pack.events:
                fields = {"dataset": event.dataset, "key": event.key, "reason": event.reason, "message": event.message}
                several = {"samples": event.num_samples} if event.num_samples != 1 else {}
                lines.append({"pack": pack.number, **fields, **several})
        try:
            append_lines(self.path, lines)
        except OSError as error:
            if not self._told_of_disk:
                _LOG.warning("%s cannot be written, what is lost is only counted from here (%s)", self.path, error)
            self._told_of_disk = True
