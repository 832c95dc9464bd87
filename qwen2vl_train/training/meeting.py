"""The ranks' meeting: who is missing is said once a minute, and nobody waits longer than a limit of the meeting's own.

Enters: this rank's place and the address of the store where they meet. Leaves: lines on stderr from one rank of each
node while others are missing; past the limit an error that names them. The collectives' limit is far longer: a node
that never comes would hold all others for it, without a word.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, Self

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from qwen2vl_train.training.launcher import Launcher, leave_for_torchrun

_FIRST_S, _AGAIN_S = 10.0, 60.0
_GRACE_S = 10.0  # the store's own waiting ends at the limit, and says more
_ASK_S = 2.0
_MOST_NAMED = 16


@dataclass
class Meeting:
    """Entered while the ranks meet. `names` keeps the keys of this start apart from those of earlier ones."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    names: str
    limit_s: float
    launcher: Launcher | None = None
    _start: float = field(default_factory=time.monotonic)
    _met: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="meeting", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._met.set()
        self._thread.join()  # asking the store in C when the interpreter ends, it would abort the process

    def wait_for_all(self, store: Store) -> None:
        """Return once every rank has come to `store`, which already uses `names`.

        Raises:
            DistStoreError: they have not within the limit.
        """
        store.set(f"here/{self.rank}", "")
        if store.add("come", 1) >= self.size:
            store.set("all", "")
        store.wait(["all"], timedelta(seconds=max(1.0, self._start + self.limit_s - time.monotonic())))

    @property
    def is_over(self) -> bool:
        """Whether the limit has passed."""
        return time.monotonic() - self._start >= self.limit_s

    def describe(self) -> str:
        """Who is waited for, by what the store knows now."""
        place = f"{self.address}:{self.port}"
        try:
            store = TCPStore(
                self.address, self.port, timeout=timedelta(seconds=_ASK_S), wait_for_workers=False, is_master=False
            )
            names = PrefixStore(self.names, store)
            missing = [rank for rank in range(self.size) if not names.check([f"here/{rank}"])]
        except (RuntimeError, ValueError):
            return f"for the store of rank 0's machine at {place}, which does not answer"
        if not missing:
            return (
                f"for connections: all {self.size} ranks have come to {place} but do not reach each other "
                "(NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names the network interface)"
            )
        named = ", ".join(map(str, missing[:_MOST_NAMED])) + (", ..." if len(missing) > _MOST_NAMED else "")
        return f"at {place} for {len(missing)} of {self.size} ranks: {named}"

    def _watch(self) -> None:
        """The thread: the main one waits in C."""
        due_s = _FIRST_S
        while not self._met.wait(0.5):
            waited_s = time.monotonic() - self._start
            if self.launcher is not None and self.launcher.is_gone:
                self._end(f"{self.launcher.name} (process {self.launcher.process}) has died while the ranks met", 1)
            if waited_s > self.limit_s + _GRACE_S:
                self._end(f"has waited {waited_s:.0f} s (engine.meeting_s={self.limit_s:g}) {self.describe()}", 2)
            if self.local_rank == 0 and waited_s > due_s:
                due_s += _AGAIN_S
                about = self.describe()
                if not self._met.is_set():
                    limit = f"the run ends after {self.limit_s:g} s, engine.meeting_s"
                    self._say(f"has waited {waited_s:.0f} s {about} ({limit})")

    def _say(self, text: str) -> None:
        with suppress(OSError):
            print(f"rank {self.rank} ({socket.gethostname()}) {text}", file=sys.stderr, flush=True)

    def _end(self, text: str, code: int) -> NoReturn:
        try:
            leave_for_torchrun(text, time.time())
            self._say(text)
        finally:
            os._exit(code)
