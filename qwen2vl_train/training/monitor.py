"""What a person watches: one line of JSON per log, the same figures in wandb, a progress bar on a terminal, lines else.

Only rank 0 has a live monitor; the others hold a silent one, so the trainer calls it unconditionally.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipelines.whole import append_lines, as_lines, read_lines, write_whole
from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.training.clock import RunClock
from qwen2vl_train.training.shown import Shown
from qwen2vl_train.training.tracker import Tracker

_LINE_S = 30.0


class Monitor:
    """Writes `metrics.jsonl` in the run's folder, wandb, and the console. `active=False` makes every call silent."""

    def __init__(self, run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], active: bool) -> None:
        self.console = Console(quiet=not active)
        self._path = run_dir / "metrics.jsonl"
        self._progress: Progress | None = None
        self._task: Any = None
        self._lines: _Lines | None = None
        self._active = active
        self._told_of_disk = False
        self.clock = RunClock(run_dir)
        self._tracker = Tracker(run_dir, config, settings, self.warn) if active else None

    def warn(self, text: str) -> None:
        """Say something that people should see, without stopping."""
        self.console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False, soft_wrap=True)

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record figures after `step` finished updates of the stage; one that is not finite becomes null.

        Where the disk has no room for them, that is said once, and training goes on.
        """
        if self._tracker is None:
            return
        plain = {name: _finite(value) for name, value in metrics.items()}
        self._keep(lambda: append_lines(self._path, [{"stage": stage, "step": step, **plain}]))
        self._keep(self.clock.save)
        self._tracker.log(stage, step, plain)

    def _keep(self, write: Callable[[], None]) -> None:
        """Figures are for watching: what they cannot be written to must not cost the run."""
        try:
            write()
        except OSError as error:
            if not self._told_of_disk:
                self.warn(f"figures cannot be written, training goes on ({error}); make room or repair the disk")
            self._told_of_disk = True

    def forget_after(self, stage: str, step: int) -> None:
        """Drop logged lines of `stage` later than `step`: the resumed run will write them again.

        A line that a killed run left half, or that is damaged otherwise, goes, too. Of a stage that begins anew (`step`
        below 0) wandb gets a new run.
        """
        if self._tracker is not None and step < 0:
            self._tracker.begin_anew(stage)
        if not self._active or not self._path.exists():
            return
        lines = [line for line in read_lines(self._path) if isinstance(line.get("step"), int)]
        kept = as_lines(line for line in lines if line.get("stage") != stage or line["step"] <= step)
        self._keep(lambda: write_whole(self._path, kept))

    def describe(self, stage: str, name: str, facts: Mapping[str, Any]) -> None:
        """Keep what is known of a stage before its first step: `<stage>/<name>.json` in the run's folder, and wandb."""
        if self._tracker is not None:
            text = json.dumps(facts, indent=1) + "\n"
            self._keep(lambda: write_whole(self._path.parent / stage / f"{name}.json", text))
            self._tracker.describe(stage, name, facts)

    def show(self, stage: str, samples: Sequence[Shown]) -> None:
        """A wandb table of held-out pictures with true and predicted text and boxes."""
        if self._tracker is not None:
            self._tracker.show(stage, samples)

    def start_progress(self, description: str, total: int, done: int = 0) -> None:
        """Open a progress bar of `total` steps; in a log file, a line now and then."""
        self.stop_progress()
        if self._active and not self.console.is_terminal:
            self._lines = _Lines(self.console, description.strip(), total, done)
        elif self._active:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            tail = (TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._progress = Progress(*columns, *tail, console=self.console)
            self._task = self._progress.add_task(description, total=total, completed=done, note="")
            self._progress.start()

    def advance(self, done: int, note: str = "") -> None:
        """Set the progress to `done` steps with a short note beside it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        if self._lines is not None:
            self._lines.advance(done, note)

    def stop_progress(self) -> None:
        """Close the progress bar, or say the last line."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self, failed: bool = False) -> None:
        """Finish the wandb run (within a bounded time) and the progress bar."""
        self.stop_progress()
        if self._tracker is not None:
            self._tracker.close(failed)


class _Lines:
    """Progress for a log file: a line at most every `_LINE_S` seconds, the first and the last always.

    "vision  120 of 1,000  loss 2.345  9,876 tok/s  data wait 3%  0:12:30 left"
    """

    def __init__(self, console: Console, description: str, total: int, done: int) -> None:
        self._console, self._description, self._total = console, description, total
        self._first, self._start = done, time.monotonic()
        self._due = self._start
        self._unsaid: str | None = None

    def advance(self, done: int, note: str) -> None:
        """Say it if a line is due."""
        now = time.monotonic()
        words = [self._description, f"{done:,} of {self._total:,}", note]
        if self._first < done < self._total:
            left_s = (now - self._start) * (self._total - done) / (done - self._first)
            words.append(f"{timedelta(seconds=round(left_s))} left")
        self._unsaid = "  ".join(filter(None, words))
        if now >= self._due or done >= self._total:
            self._due = now + _LINE_S
            self.close()

    def close(self) -> None:
        """Say what has not been said yet."""
        if self._unsaid is not None:
            self._console.print(self._unsaid, markup=False, highlight=False, soft_wrap=True)
        self._unsaid = None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
