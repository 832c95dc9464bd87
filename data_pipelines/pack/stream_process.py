"""Streamed packs from a process of their own, so that reading and counting run beside training.

Enters: what makes a `StreamPlanner`. Leaves: its packs, through a pipe; the process is ahead by what the pipe holds
(64 KB) and one pack. Costs a copy of each pack's stored bytes. A process that dies is replaced: it reads the shards
that were under way again. It ends with `close`, and with its parent, however that ends.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

from data_pipelines.errors import UserError
from data_pipelines.pack.workers import isolate
from data_pipelines.plan.stream import StreamedPack, StreamPlanner
from data_pipelines.samples import LedgerEvent

# Called in the process, which is forked: it begins behind the packs that its parent has got so far.
MakePlanner = Callable[[], StreamPlanner]
_POLL_S = 1.0
_MAX_DEATHS_IN_A_ROW = 3


class StreamProcess:
    """Packs of the planner that `make_planner` makes in a forked process.

    Raises (from `next_pack`):
        UserError: as the planner. RuntimeError: a defect, with its traceback; deaths without a pack.
    """

    def __init__(self, make_planner: MakePlanner) -> None:
        self._make_planner = make_planner
        self._number = self._deaths = 0
        self._notes: tuple[LedgerEvent, ...] = ()
        self._process, self._pipe = self._start()

    def next_pack(self) -> StreamedPack:
        """The next pack; waits for it."""
        while True:
            try:
                while not self._pipe.poll(_POLL_S):
                    if not self._process.is_alive() and not self._pipe.poll():
                        raise EOFError
                status, content = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                self._replace()
                continue
            if status == "error":
                raise content
            pack: StreamedPack = replace(content, number=self._number, events=(*self._notes, *content.events))
            self._notes, self._deaths = (), 0
            self._number += 1
            return pack

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> tuple[ForkProcess, Connection]:
        context = get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve,
            args=(theirs, ours, self._make_planner, os.getpid()),
            daemon=True,
            name="data-stream",
        )
        process.start()
        theirs.close()
        return process, ours

    def _replace(self) -> None:
        self.close()
        self._deaths += 1
        code = self._process.exitcode
        if self._deaths > _MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(f"the process that streams the shards dies before a pack (exit {code}); out of memory?")
        message = f"the process that streams the shards died (exit {code}); those under way are read again"
        self._notes = (LedgerEvent("", f"pack {self._number}", "worker_replaced", message),)
        self._process, self._pipe = self._start()


def _serve(pipe: Connection, parents_end: Connection, make: Callable[[], StreamPlanner], parent: int) -> None:
    """The process's life: packs into the pipe, until the parent closes it or dies."""
    isolate(parent)
    parents_end.close()
    try:
        planner = make()
        while True:
            pipe.send_bytes(pickle.dumps(("pack", planner.next_pack()), pickle.HIGHEST_PROTOCOL))
    except BrokenPipeError:
        return
    except UserError as error:
        pipe.send_bytes(pickle.dumps(("error", error)))
    except Exception:
        defect = RuntimeError(f"the process that streams the shards failed:\n{traceback.format_exc()[-8000:]}")
        pipe.send_bytes(pickle.dumps(("error", defect)))
