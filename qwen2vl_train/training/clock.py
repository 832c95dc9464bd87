"""How long a run has taken, over all its invocations: what a person waited for, not what one command took.

Enters: the run's folder. Leaves: `elapsed.json` in it, rewritten at each log: an invocation that is killed counts up to
its last one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from data_pipelines.whole import write_whole


class RunClock:
    """Seconds of the invocations before and of this one."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "elapsed.json"
        try:
            self._before_s = float(json.loads(self._path.read_text())["seconds"])
        except (OSError, ValueError):  # none yet, or emptied by a power cut: no reason not to train
            self._before_s = 0.0
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Of all invocations until now."""
        return self._before_s + time.monotonic() - self._start

    def save(self) -> None:
        """Count this invocation until now, whatever becomes of it."""
        # not flushed: beside a checkpoint that is being written, waiting for the disk would hold training up
        write_whole(self._path, json.dumps({"seconds": round(self.seconds(), 3)}), flush=False)
