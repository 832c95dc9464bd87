"""One run in one folder: rank 0 holds a lock on `RUN/.lock` for as long as it runs.

Enters: the run's folder. Leaves: `.lock`, which says who holds it, or held it last: the system takes the lock back when
its process ends, however that ends, so a file that was left behind is no obstacle. Two runs in one folder would write
each other's checkpoints.

A POSIX record lock: network file systems know it, and data workers that are forked do not inherit it. It is lost when
its process closes any descriptor of the file, so rank 0 opens it here alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from qwen2vl_train.config import ConfigError

_WAIT_S = 15.0  # what is being ended: its launcher has died, or its last rank is still closing
_RESTART_WAIT_S = 120.0  # rank 0 may have been on a node that was lost, and notices that later than the others


class RunLock:
    """The lock of the run in `folder`, not held yet."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None

    def take(self, restarted: bool = False) -> str | None:
        """Hold the lock until `release`; returns why it cannot be held, where the file system knows no locks.

        Waits a little for a holder that is just ending; longer where the launcher has `restarted` this run, since the
        holder is then the start before.

        Raises:
            ConfigError: another run holds it.
            OSError: the file cannot be written.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + (_RESTART_WAIT_S if restarted else _WAIT_S)
        told = False
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
                holder = _describe(descriptor)
            except OSError as error:  # ENOLCK, ENOSYS, EOPNOTSUPP
                os.close(descriptor)
                return f"{self.path} cannot be locked ({error}): start no second run in this folder beside this one"
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ConfigError(
                    f"run_dir={self.path.parent} is in use by another run ({holder}). Wait for its end or end it "
                    "(SIGTERM writes a checkpoint), or choose another run_dir"
                )
            if not told:
                with suppress(OSError):
                    print(f"{self.path.parent} is in use ({holder}): waiting for its end", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        self._descriptor = descriptor
        mine = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
        os.fsync(descriptor)
        return None

    def release(self) -> None:
        """Give the folder free; nothing where the lock is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _describe(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # just being written
        return "its process has not said its name yet"
