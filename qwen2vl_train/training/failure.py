"""How a run ends when a rank fails: the first cause is said last, whichever rank ends first, and nobody waits.

Enters: the exception that ended this rank's work. Leaves: a plain message. The first rank to fail leaves its cause in
the rendezvous store; the others, which fail next because a collective broke, name it instead of their own consequence.
Every rank also leaves it where torchrun looks for the words of its closing block, which it prints last of all: torchrun
may see the end of a rank that only suffered first, and another node's torchrun never sees the rank that failed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from torch._C._distributed_c10d import Store

from data_pipelines.errors import UserError
from qwen2vl_train.training.launcher import leave_for_torchrun
from qwen2vl_train.training.world import World

_CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket timeout|nccl.*(abort|remote|unhandled)|"
    r"EnforceNotMet|recvValue failed|peer",
    re.IGNORECASE,
)
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FAILURE_PREFIX, FAILURE_KEY = "failure", "first"
_WAIT_S = 5.0
_LINGER_S = 15.0  # the others look every 5 s at most (watchdog), and then have 5 s for an exception of their own


def exit_after(error: Exception, world: World, code: int | None = None) -> NoReturn:
    """Say why this rank's work ended and end its process, with code 2 for what the user can mend and 1 else.

    Without leaving the process group: other ranks may wait in a collective that will never come.
    """
    mendable, message = isinstance(error, UserError), str(error)
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:  # wherever it was met
        mendable, message = True, f"{error}; make room (or repair the disk) and start the same command again"
    own = describe_failure(world.rank, message if mendable else f"{type(error).__name__}: {error}")
    trace = "" if mendable and not os.environ.get("QWEN2VL_DEBUG") else "".join(traceback.format_exception(error))
    # before the others can learn of it and end: torchrun looks for it as soon as one has
    leave_for_torchrun(f"{trace}{name_failure(own)}", own["time_s"])
    store = _connect(world)
    first = _first_cause(own, store, wait_only=is_consequence(error)) or own
    try:
        if first["rank"] == world.rank:
            print(f"{trace}\n{name_failure(own)}", file=sys.stderr)
        elif first["message"] != own["message"] or (first["host"] != own["host"] and world.local_rank == 0):
            # not the one mistake that all ranks find, or said on another machine alone
            print(f"\n{name_first_cause(first, world.rank)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        leave_store(store, world)
    finally:  # also where the disk of the log is full
        os._exit(code or (2 if mendable else 1))


def is_consequence(error: BaseException) -> bool:
    """Whether `error` is what a rank meets when another one has ended: a broken collective."""
    return isinstance(error, RuntimeError) and bool(_CONSEQUENCE.search(str(error)))


def name_first_cause(first: dict[str, Any], rank: int) -> str:
    """What rank `rank` says when it ends because of `first`, another rank's failure; torchrun will say it, too."""
    text = f"rank {rank} ended: rank {first['rank']} ({first['host']}) failed first\n{name_failure(first)}"
    leave_for_torchrun(text, first["time_s"] + 1)  # torchrun takes the earliest for the root, in whole seconds
    return text


def read_first_cause(failures: Store) -> dict[str, Any] | None:
    """The first failure of the run, if any rank has claimed one in the store under `FAILURE_PREFIX`."""
    if not failures.check([FAILURE_KEY]):
        return None
    first: dict[str, Any] = json.loads(failures.get(FAILURE_KEY))
    return first


def claim_first_cause(own: dict[str, Any], failures: Store) -> dict[str, Any]:
    """Tell the other ranks of `own` through the store under `FAILURE_PREFIX`; returns whichever was told first."""
    winner: dict[str, Any] = json.loads(failures.compare_set(FAILURE_KEY, "", json.dumps(own)))
    return winner


def leave_store(store: Store | None, world: World) -> None:
    """Tell the rank that hosts the store that this one has read the cause; that rank waits for it, for a while."""
    if store is None:
        return
    with suppress(RuntimeError, ValueError):  # the store is gone, and so is its host
        store.set(f"told/{world.rank}", "")
        deadline = time.monotonic() + _LINGER_S
        while world.hosts_store and time.monotonic() < deadline:
            if store.check([f"told/{rank}" for rank in range(world.size)]):
                break
            time.sleep(0.1)


def describe_failure(rank: int, message: str) -> dict[str, Any]:
    """A cause as the ranks tell each other of it."""
    return {"rank": rank, "host": socket.gethostname(), "message": message, "time_s": time.time()}


def name_failure(cause: dict[str, Any]) -> str:
    """The line that a rank's words end with."""
    return f"error (rank {cause['rank']}): {cause['message']}"


def _connect(world: World) -> Store | None:
    """A connection to the store; None where it went down with rank 0's node."""
    try:
        return world.connect_store(FAILURE_PREFIX)
    except (RuntimeError, ValueError, OSError):
        return None


def _first_cause(own: dict[str, Any], store: Store | None, wait_only: bool) -> dict[str, Any] | None:
    """Claim the first place for `own`, or, when it is only a consequence, wait a little for whoever claims it."""
    if store is None:
        return None
    try:
        deadline = time.monotonic() + _WAIT_S
        while wait_only and not store.check([FAILURE_KEY]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        return claim_first_cause(own, store)
    except (RuntimeError, ValueError):
        return None  # it went down just now
