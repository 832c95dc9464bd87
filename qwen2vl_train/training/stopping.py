"""Pre-emption: a signal asks the run to stop, the loop finishes its step, writes a checkpoint and ends.

Enters: SIGTERM, SIGUSR1 or Ctrl-C in any rank. Leaves: a flag that the next step spreads to every rank, and exit code
75 (EX_TEMPFAIL: start the same command again) once the checkpoint is written.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_PREEMPTED = 75
EXIT_STALLED = 76

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(Exception):  # noqa: N818  (an order that was carried out, not an error)
    """The run was asked to stop and did; the message says where its checkpoint lies."""


class StopRequest:
    """While entered, signals set `requested` instead of ending the process; main thread only.

    Repeated signals change nothing: torchrun passes Ctrl-C on to ranks that the terminal has signalled already.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = "another rank"
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.reason = signal.Signals(number).name
