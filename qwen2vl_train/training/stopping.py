"""Pre-emption: a signal asks the run to stop; it ends where nothing is lost, with an exit code that says "again".

Enters: SIGTERM, SIGUSR1 or Ctrl-C in any rank. Leaves: a flag that the loop's next step spreads to every rank, which
then write a checkpoint; outside the loop, the next boundary between two pieces of work ends the run. While the ranks
still meet nothing can be lost, and the process ends at once. Exit code 75 (EX_TEMPFAIL: start the same command again),
or 74 (EX_IOERR) where the checkpoint could not be written.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from qwen2vl_train.training.world import World

EXIT_UNSAVED = 74
EXIT_PREEMPTED = 75
EXIT_STALLED = 76

UNSAVED = (
    "its checkpoint could not be written (see above), so the steps since the last one are lost: make room, then start "
    "the same command again"
)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(Exception):  # noqa: N818  (an order that was carried out, not an error)
    """The run was asked to stop and did; the message says where, and where its checkpoint lies.

    `code` is for the process to end with: by itself the same command goes on, but not from `EXIT_UNSAVED`.
    """

    def __init__(self, message: str, code: int = EXIT_PREEMPTED) -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """Entered around a whole run; signals then set `requested` instead of ending the process. Main thread only.

    Repeated signals change nothing: torchrun passes Ctrl-C on to ranks that the terminal has signalled already.
    `announce` says at once that the signal was heard: up to the next boundary it can take minutes.
    """

    def __init__(self) -> None:
        self.requested = False
        self.announce = False
        self.reason = "another rank's signal"
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def let_end(self) -> None:
        """The process ends now: signals that come from here on, torchrun's to the ranks left, change its code no more.

        For programs that end after this; what is entered as a part of another one restores its handlers.
        """
        self._previous = dict.fromkeys(_SIGNALS, signal.SIG_IGN)

    def obey(self, world: World, where: str, saved: bool = True) -> None:
        """End the run here if any rank was asked to stop; not `saved`, steps are lost with it. Collective.

        Raises:
            Preempted: on every rank; `where` completes "stopped ...".
        """
        if self.is_asked(world):
            stopped = f"stopped {where} on {self.reason}"
            if not saved:
                raise Preempted(f"{stopped}; {UNSAVED}", EXIT_UNSAVED)
            raise Preempted(f"{stopped}; the same command continues")

    def is_asked(self, world: World) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return bool(world.sum(torch.tensor(float(self.requested), device=world.device)).item())

    def is_cause_of(self, error: Exception) -> bool:
        """Whether `error` only says that the signal, sent to the whole process group, ended helper processes, too."""
        return self.requested and isinstance(error, BrokenExecutor)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker has inherited this; its parent ends it
        if self.announce and not self.requested:
            with suppress(OSError, RuntimeError):  # RuntimeError: it came amid another write of this thread
                print(
                    f"\n{signal.Signals(number).name}: the run ends at the next safe place", file=sys.stderr, flush=True
                )
        self.requested = True
        self.reason = signal.Signals(number).name


class LeaveOnSignal:
    """Entered while the ranks meet: a signal ends this process at once. Main thread only.

    That wait is in C, where Python's own handlers would only run once it is over. Inside `StopRequest`, no signal is
    lost between the two.
    """

    def __init__(self) -> None:
        self._met = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._met.set()
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # one that came just now goes to the handler beneath

    def _listen(self) -> None:
        while not self._met.is_set():
            if came := signal.sigtimedwait(_SIGNALS, 0.1):
                name = signal.Signals(came.si_signo).name
                with suppress(OSError):
                    print(f"\n{name} while the ranks met: nothing is lost", file=sys.stderr, flush=True)
                os._exit(EXIT_PREEMPTED)
