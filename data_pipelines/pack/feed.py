"""Items that a process of its own makes ahead of need, so that the time they take is not the training's.

Enters: a function that gives the items, one after the other. Leaves: the same items in the same order, pickled through
a pipe. The process is ahead by what the pipe holds (`pipe_bytes`, where the system allows them) and one item, so its
memory is bounded. It ends with `close`, and with its parent, however that ends; one that dies is replaced.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Generic, TypeVar

from data_pipelines.errors import UserError
from data_pipelines.pack.workers import isolate

AnyItem = TypeVar("AnyItem")

_POLL_S = 1.0
_KILL_S = 10.0  # as a worker's: a killed process that hangs in the kernel is left to it
_MAX_DEATHS_IN_A_ROW = 3


class Feed(Generic[AnyItem]):
    """The items of `make_items`, which is called in a forked process: anew for every one that has died, so it begins
    behind the items that its caller has got so far. `doing` says, in an error, what the process does.

    Raises (from `next`):
        UserError: as the items' own. RuntimeError: a defect, with its traceback; deaths without an item.
    """

    def __init__(
        self, make_items: Callable[[], Iterator[AnyItem]], name: str, doing: str, pipe_bytes: int | None = None
    ) -> None:
        self._make_items, self._name, self._doing, self._pipe_bytes = make_items, name, doing, pipe_bytes
        self._process, self._pipe = self._start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid or 0

    def next(self) -> tuple[AnyItem, tuple[int | None, ...]]:
        """The next item, and the exit codes of the processes that died before one could give it; waits for it."""
        deaths: list[int | None] = []
        while True:
            try:
                while not self._pipe.poll(_POLL_S):
                    if not self._process.is_alive() and not self._pipe.poll():
                        raise EOFError
                status, content = pickle.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                deaths.append(self._replace(len(deaths)))
                continue
            if status == "error":
                raise content
            return content, tuple(deaths)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join(_KILL_S)
        self._pipe.close()

    def _start(self) -> tuple[ForkProcess, Connection]:
        context = get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        if self._pipe_bytes is not None and sys.platform == "linux":
            with suppress(OSError):  # over the user's share of pipe memory: it stays as it is, 64 KiB
                fcntl.fcntl(theirs.fileno(), fcntl.F_SETPIPE_SZ, self._pipe_bytes)
        process = context.Process(
            target=_serve,
            args=(theirs, ours, self._make_items, self._doing, os.getpid()),
            daemon=True,
            name=self._name,
        )
        process.start()
        theirs.close()
        return process, ours

    def _replace(self, deaths: int) -> int | None:
        """Start another process; the exit code of the one that died."""
        self.close()
        code = self._process.exitcode
        if deaths >= _MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(f"the process that {self._doing} dies again and again (exit {code}); out of memory?")
        self._process, self._pipe = self._start()
        return code


def _serve(
    pipe: Connection, parents_end: Connection, make_items: Callable[[], Iterator[Any]], doing: str, parent: int
) -> None:
    """The process's life: items into the pipe, until the parent closes it or dies."""
    isolate(parent)
    parents_end.close()
    try:
        for item in make_items():
            pipe.send_bytes(pickle.dumps(("item", item), pickle.HIGHEST_PROTOCOL))
    except BrokenPipeError:
        return
    except UserError as error:
        pipe.send_bytes(pickle.dumps(("error", error)))
    except Exception:
        defect = RuntimeError(f"the process that {doing} failed:\n{traceback.format_exc()[-8000:]}")
        pipe.send_bytes(pickle.dumps(("error", defect)))
