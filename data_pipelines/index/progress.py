"""How far indexing is, on stderr, where nobody else shows it: nothing for two seconds, then a line.

On a terminal the line is drawn over itself each second; into a pipe or file it is one line every ten seconds. It is
drawn by a thread, so that it also moves while one large shard is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Event, Thread

Progress = Callable[[str, int, int], None]
QUIET_S = 2.0
_TERMINAL_S, _PIPE_S = 1.0, 10.0


@contextmanager
def progress_on_stderr(total: int, progress: Progress | None) -> Generator[Progress, None, None]:
    """`progress` itself, if there is one; else a display of the shards done, of `total`."""
    if progress is not None or total == 0:
        yield progress or (lambda shard, done, total: None)
        return
    display = _Display(total)
    thread = Thread(target=display.run, daemon=True, name="index-progress")
    thread.start()
    try:
        yield display.advance
    finally:
        display.over.set()
        thread.join()


class _Display:
    """Counts shards, and says so while `over` is not set."""

    def __init__(self, total: int) -> None:
        self.over = Event()
        self._done, self._total, self._start = 0, total, time.monotonic()

    def advance(self, shard: str, done: int, total: int) -> None:
        """Another shard is done."""
        self._done = done

    def run(self) -> None:
        """The thread's life."""
        if self.over.wait(QUIET_S):
            return
        terminal = sys.stderr.isatty()
        while True:
            line = f"indexing shards: {self._done:,} of {self._total:,} done, {time.monotonic() - self._start:.0f} s"
            self._write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
            if self.over.wait(_TERMINAL_S if terminal else _PIPE_S):
                break
        line = f"indexed {self._done:,} of {self._total:,} shards in {time.monotonic() - self._start:.0f} s"
        self._write(f"\r\x1b[K{line}\n" if terminal else f"{line}\n")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
