"""Pre-emption: a signal asks the run to stop; it ends where nothing is lost, with an exit code that says "again".

Enters: SIGTERM, SIGUSR1 or Ctrl-C in any rank, once the ranks have met (before, nothing can be lost). Leaves: a flag
that the loop's next step spreads to every rank, which then write a checkpoint; outside the loop, the next boundary
between two pieces of work ends the run. Exit code 75 (EX_TEMPFAIL: start the same command again).
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from qwen2vl_train.training.world import World

EXIT_PREEMPTED = 75
EXIT_STALLED = 76

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(Exception):  # noqa: N818  (an order that was carried out, not an error)
    """The run was asked to stop and did; the message says where, and where its checkpoint lies."""


class StopRequest:
    """Entered around a whole run; signals then set `requested` instead of ending the process. Main thread only.

    Repeated signals change nothing: torchrun passes Ctrl-C on to ranks that the terminal has signalled already.
    `announce` says at once that the signal was heard: up to the next boundary it can take minutes.
    """

    def __init__(self, announce: bool = False) -> None:
        self.requested = False
        self._process = os.getpid()
        self.reason = "another rank's signal"
        self._announce = announce
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def obey(self, world: World, where: str) -> None:
        """End the run here if any rank was asked to stop. Collective.

        Raises:
            Preempted: on every rank; `where` completes "stopped ...".
        """
        asked = world.sum(torch.tensor(float(self.requested), device=world.device))
        if asked.item():
            raise Preempted(f"stopped {where} on {self.reason}; the same command continues")

    def is_cause_of(self, error: Exception) -> bool:
        """Whether `error` only says that the signal, sent to the whole process group, ended helper processes, too."""
        return self.requested and isinstance(error, BrokenExecutor)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker has inherited this; its parent ends it
        if self._announce and not self.requested:
            with suppress(OSError, RuntimeError):  # RuntimeError: it came amid another write of this thread
                print(
                    f"\n{signal.Signals(number).name}: the run ends at the next safe place", file=sys.stderr, flush=True
                )
        self.requested = True
        self.reason = signal.Signals(number).name
