"""Items that a process of its own makes ahead of need, so that the time they take is not the training's.

Enters: a function that gives the items, one after the other. Leaves: the same items in the same order, pickled through
a pipe. The process is ahead by `ahead_bytes` of them, what the pipe holds and one item, so its memory is bounded. It
ends with `close`, and with its parent, however that ends. One that dies is replaced, and so is one that stands still
while it is waited for: no sign of life in `stall_s`, neither a call of its `watch` nor a byte of an item. A slow one
that goes on calling is never late.
"""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

from data_pipelines.errors import ShardError, UserError
from data_pipelines.pack.workers import isolate

AnyItem = TypeVar("AnyItem")
# A sign of life of the process, with what it is at.
Watch = Callable[[str], None]

_POLL_S = 1.0
_KILL_S = 10.0  # as a worker's: a killed process that hangs in the kernel is left to it
_MAX_DEATHS_IN_A_ROW = 3
_MAX_STALLS_IN_A_ROW = 1
_HEADER = struct.Struct("=QQ")  # of an item in the pipe: its bytes, and how many items lie ready behind it
_SIGN = struct.Struct("=qq")  # of life: when, in ns of the monotonic clock, and the length of the text behind it
_SIGN_BYTES = 4096


class Feed(Generic[AnyItem]):
    """The items of `make_items(watch)`, which is called in a forked process: anew for every one that is replaced, so it
    begins behind the items that its caller has got so far. `doing` says, in an error, what the process does.

    Raises (from `take` and `wait`):
        UserError: as the items' own. RuntimeError: a defect, with its traceback; deaths without an item.
        ShardError: it stood still twice without an item between (reason "stalled_shard"), with what it was at.
    """

    def __init__(
        self,
        make_items: Callable[[Watch], Iterator[AnyItem]],
        name: str,
        doing: str,
        stall_s: float,
        ahead_bytes: int = 0,
    ) -> None:
        self._make_items, self._name, self._doing = make_items, name, doing
        self._stall_s, self._ahead_bytes = stall_s, ahead_bytes
        self._sign = mmap.mmap(-1, _SIGN_BYTES)
        self._waited_since_ns: int | None = None
        self._ends: list[str] = []  # of the processes that gave no item any more, in words
        self._deaths = self._stalls = 0
        self._behind = 0  # items that lie ready behind the last one taken
        self._process, self.pipe = self._start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid or 0

    def take(self) -> tuple[AnyItem, tuple[str, ...]] | None:
        """The next item if it is made, and how the processes ended that could not give it; None: it is not made yet."""
        if not self._behind and not self.pipe.poll():
            return None
        try:
            size, self._behind = _HEADER.unpack(self._read(_HEADER.size))
            status, content = pickle.loads(self._read(size))
        except (EOFError, OSError) as error:
            self._replace(stalled=isinstance(error, TimeoutError))
            return None
        if status == "error":
            raise content
        ends, self._ends = tuple(self._ends), []
        self._deaths = self._stalls = 0
        return content, ends

    def wait(self) -> None:
        """Wait until `take` may give an item: one comes, or a process was replaced."""
        try:
            self._await_bytes()
        except (EOFError, OSError) as error:
            self._replace(stalled=isinstance(error, TimeoutError))

    def under_way(self) -> list[str]:
        """What the process is at and for how long, while it is waited for. From any thread."""
        since_ns = self._waited_since_ns
        if since_ns is None:
            return []
        return [
            f"{self._at() or 'at its beginning'} (the process that {self._doing}, process {self.pid}, "
            f"for {self._still_s(since_ns):.0f} s)"
        ]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join(_KILL_S)
        self.pipe.close()

    def _read(self, size: int) -> bytearray:
        """`size` bytes of the pipe; they are waited for as long as more of them come."""
        data, got = bytearray(size), 0
        view = memoryview(data)
        while got < size:
            self._await_bytes()
            count = os.readv(self.pipe.fileno(), [view[got:]])
            if not count:
                raise EOFError
            got += count
        return data

    def _await_bytes(self) -> None:
        """Wait for bytes in the pipe, or its end.

        Raises:
            EOFError: the process is dead. TimeoutError: it stands still.
        """
        began = self._waited_since_ns = time.monotonic_ns()
        try:
            while not self.pipe.poll(_POLL_S):
                if not self._process.is_alive() and not self.pipe.poll():
                    raise EOFError
                if self._still_s(began) > self._stall_s:
                    raise TimeoutError
        finally:
            self._waited_since_ns = None

    def _still_s(self, since_ns: int) -> float:
        """Seconds without a sign of life, of those since `since_ns`."""
        signed_ns: int = _SIGN.unpack_from(self._sign)[0]
        return (time.monotonic_ns() - max(since_ns, signed_ns)) / 1e9

    def _at(self) -> str:
        length = _SIGN.unpack_from(self._sign)[1]
        return self._sign[_SIGN.size : _SIGN.size + length].decode("utf-8", "replace")

    def _start(self) -> tuple[ForkProcess, Connection]:
        context = get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        self._behind = 0
        _give_sign(self._sign, "")
        process = context.Process(
            target=_serve,
            args=(theirs, ours, self._make_items, self._doing, self._sign, self._ahead_bytes, os.getpid()),
            daemon=True,
            name=self._name,
        )
        process.start()
        theirs.close()
        return process, ours

    def _replace(self, stalled: bool) -> None:
        """Start another process, and note how the one before it ended."""
        at = self._at()
        self.close()
        code = self._process.exitcode
        if stalled:
            self._stalls += 1
            self._ends.append(f"stood still for {self._stall_s:g} s" + (f" at {at}" if at else ""))
        else:
            self._deaths += 1
            self._ends.append(f"died (exit {code})")
        if self._stalls > _MAX_STALLS_IN_A_ROW:
            message = (
                f"the process that {self._doing} stood still for {self._stall_s:g} s, {self._stalls} times in a row: "
                "does its storage answer?"
            )
            raise ShardError(at or self._name, "stalled_shard", message)
        if self._deaths > _MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(f"the process that {self._doing} dies again and again (exit {code}); out of memory?")
        self._process, self.pipe = self._start()


def _give_sign(sign: mmap.mmap, what: str) -> None:
    text = what.encode("utf-8", "replace")[: _SIGN_BYTES - _SIGN.size]
    sign[_SIGN.size : _SIGN.size + len(text)] = text
    _SIGN.pack_into(sign, 0, time.monotonic_ns(), len(text))


def _serve(
    pipe: Connection,
    parents_end: Connection,
    make_items: Callable[[Watch], Iterator[Any]],
    doing: str,
    sign: mmap.mmap,
    ahead_bytes: int,
    parent: int,
) -> None:
    """The process's life: items into the pipe, until the parent closes it or dies."""
    isolate(parent)
    parents_end.close()
    outbox = _Outbox(pipe.fileno(), ahead_bytes)
    try:
        for item in make_items(lambda what: _give_sign(sign, what)):
            outbox.put(pickle.dumps(("item", item), pickle.HIGHEST_PROTOCOL))
    except UserError as error:
        outbox.put(pickle.dumps(("error", error)))
    except Exception:
        defect = RuntimeError(f"the process that {doing} failed:\n{traceback.format_exc()[-8000:]}")
        outbox.put(pickle.dumps(("error", defect)))
    outbox.flush()


class _Outbox:
    """Messages on their way into a pipe. A thread writes them, so that more are made while nobody reads."""

    def __init__(self, descriptor: int, max_bytes: int) -> None:
        self._descriptor, self._max_bytes = descriptor, max_bytes
        self._messages: deque[bytes] = deque()  # the first is being written
        self._bytes = 0
        self._changed = Condition()
        Thread(target=self._write, daemon=True).start()

    def put(self, message: bytes) -> None:
        """Add a message; waits while there is no room for it beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._messages or self._bytes + len(message) <= self._max_bytes)
            self._messages.append(message)
            self._bytes += len(message)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._messages)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._messages))
                message, behind = self._messages[0], len(self._messages) - 1
            try:
                for part in (_HEADER.pack(len(message), behind), message):
                    view = memoryview(part)
                    while view:
                        view = view[os.write(self._descriptor, view) :]
            except OSError:
                os._exit(0)  # the parent closed the pipe
            with self._changed:
                self._messages.popleft()
                self._bytes -= len(message)
                self._changed.notify_all()
