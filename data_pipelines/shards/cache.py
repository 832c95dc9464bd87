"""Blocks of remote shards on local disk, bounded in bytes, shared by all processes of a node.

Enters: a block's name and bytes. Leaves: ranges of it, or None once it had to make room. Costs a file's open and
`pread` per read, and per block kept the listing of its set's few files.

The bound holds without a table or a global lock: a block's name decides its set, one of 64 folders, each with a 64th of
the bytes; the blocks of a set that were not read for longest make room. Blocks appear by rename, so that a reader finds
a whole one or none; one that a power cut left short counts as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SETS = 64
_POLL_S = 0.02


class BlockCache:
    """At most `max_bytes` of blocks in `folder`, besides what is being written at the moment.

    A block over its set's share, max_bytes / `sets`, is not kept: fewer sets take larger ones, and list more files.
    """

    def __init__(self, folder: Path, max_bytes: int, sets: int = SETS) -> None:
        self._folder, self._set_bytes, self._sets = folder, max_bytes // sets, sets

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """`size` bytes from `offset` of a block; None where it is not (or not whole) in the cache."""
        try:
            descriptor = os.open(self._set(name) / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            data = os.pread(descriptor, size, offset)
            with suppress(OSError):  # another user's block, or a read-only disk
                os.utime(descriptor)  # read lately: others make room first
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return data if len(data) == size else None

    def has(self, name: str) -> bool:
        """Whether a block is there now."""
        return (self._set(name) / name).is_file()

    def put(self, name: str, data: bytes) -> None:
        """Keep a block. A disk that is full or read-only costs the cache, never the reader."""
        for _ in self.keep(name, len(data), (data,)):
            pass

    def keep(self, name: str, size: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces; once the last has passed, they are one block, if they have `size` bytes in all."""
        folder = self._set(name)
        aside = folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        kept = size <= self._set_bytes
        try:
            for piece in pieces:
                kept = kept and _append(aside, piece)
                yield piece
            with suppress(OSError):
                if kept and aside.stat().st_size == size:
                    with _locked(folder):
                        self._make_room(folder, size, aside.name)
                        aside.replace(folder / name)
        finally:
            with suppress(OSError):
                aside.unlink()

    @contextmanager
    def turn(
        self, name: str, count: int, timeout_s: float, waiting: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Hold one of `count` turns, the one that `name` decides, on this node; goes on without it after `timeout_s`.

        So at most `count` requests are under way, and processes that want the same block wait for the first of them.
        `waiting` is called again and again until it is this one's turn.
        """
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % count
        path = self._folder / "turns" / str(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            yield
            return
        try:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waiting()
                    time.sleep(_POLL_S)
                    continue
                except OSError:
                    pass  # a file system without locks
                break
            yield
        finally:
            os.close(descriptor)

    def _set(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=2).digest()
        return self._folder / "blocks" / f"{int.from_bytes(digest, 'little') % self._sets:02d}"

    def _make_room(self, folder: Path, size: int, keep: str) -> None:
        """Remove what was not read for longest, until `size` more bytes fit; leftovers of killed writers among them."""
        entries = []
        for entry in os.scandir(folder):
            if entry.name != keep:
                with suppress(OSError):  # gone meanwhile
                    facts = entry.stat()
                    entries.append((facts.st_mtime_ns, facts.st_size, entry.path))
        excess = sum(entry_size for _, entry_size, _ in entries) + size - self._set_bytes
        for _, entry_size, path in sorted(entries):
            if excess <= 0:
                break
            Path(path).unlink(missing_ok=True)
            excess -= entry_size


def _append(path: Path, piece: bytes) -> bool:
    """Whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(piece)
    except OSError:
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks: two writers may keep a block too many
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
