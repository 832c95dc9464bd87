"""The ledger: everything that was dropped, shrunk or cut, counted per dataset and reason, one JSON line each.

Enters: consumed packs with their events. Leaves: counts, and lines {"pack", "dataset", "key", "reason", "message"}
appended to a file; "samples" where a line stands for several. Costs nothing for packs without events. A resumed run
appends: lines of packs that are trained again carry the same pack numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipelines.samples import PackedBatch

# Events that cost no sample: something was noted or made smaller, the sample is in its pack.
LOSSLESS = frozenset({"shrunk", "truncated", "no_end_marker", "not_a_file", "unsafe_name", "worker_replaced"})


class Ledger:
    """Counts events of consumed packs; `counts` by (dataset, reason), `documents` by dataset number."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.counts: Counter[tuple[str, str]] = Counter()
        self.documents: Counter[int] = Counter()

    def add(self, packs: Iterable[PackedBatch]) -> None:
        """Count what `packs` hold and report; their events are appended to the file."""
        lines = []
        for pack in packs:
            self.documents.update(pack.datasets)
            for event in pack.events:
                self.counts[event.dataset, event.reason] += event.num_samples
                fields = {"dataset": event.dataset, "key": event.key, "reason": event.reason, "message": event.message}
                several = {"samples": event.num_samples} if event.num_samples != 1 else {}
                lines.append(json.dumps({"pack": pack.number, **fields, **several}) + "\n")
        if lines and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))

    def lost(self, dataset: str) -> int:
        """Samples of `dataset` that were dropped so far."""
        return sum(n for (name, reason), n in self.counts.items() if name == dataset and reason not in LOSSLESS)

    def error_rates(self, dataset_names: Sequence[str]) -> dict[str, float]:
        """Share of each dataset's samples that were dropped: lost / (lost + packed); 0 where none was seen."""
        rates = {}
        for number, name in enumerate(dataset_names):
            lost = self.lost(name)
            rates[name] = lost / max(1, lost + self.documents[number])
        return rates
