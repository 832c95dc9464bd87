"""How a run ends when a rank fails: the first cause is said last, on every rank, and nobody waits for the dead.

Enters: the exception that ended this rank's work. Leaves: a plain message. The first rank to fail leaves its cause in
the rendezvous store; the others, which fail next because a collective broke, name it instead of their own consequence.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import traceback
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from qwen2vl_train.training.world import World, connect_store

_CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|socket timeout|nccl.*(abort|remote|unhandled)|"
    r"EnforceNotMet|recvValue failed|peer",
    re.IGNORECASE,
)
FAILURE_PREFIX, FAILURE_KEY = "failure", "first"
_WAIT_S = 5.0


def exit_after(error: Exception, world: World) -> NoReturn:
    """Say why this rank's work ended and end its process, with code 2 for what the user can mend and 1 else.

    Without leaving the process group: other ranks may wait in a collective that will never come.
    """
    own = {"rank": world.rank, "host": socket.gethostname(), "message": f"{type(error).__name__}: {error}"}
    is_consequence = isinstance(error, RuntimeError) and bool(_CONSEQUENCE.search(str(error)))
    first = _first_cause(own, wait_only=is_consequence) or own
    mendable = isinstance(error, (ValueError, FileNotFoundError))
    if first["rank"] == world.rank:
        # torchrun repeats it, with its traceback, as the last thing that it prints
        get_error_handler().initialize()
        get_error_handler().record_exception(error)
        if not mendable or os.environ.get("QWEN2VL_DEBUG"):
            traceback.print_exception(error)
        said = str(error) if mendable else own["message"]
        print(f"\nerror (rank {world.rank}): {said}", file=sys.stderr)
    elif first["message"] != own["message"]:  # not the one mistake that all ranks find
        print(f"rank {world.rank} ended: rank {first['rank']} ({first['host']}) failed first", file=sys.stderr)
        print(f"\nerror (rank {first['rank']}): {first['message']}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if mendable else 1)


def _first_cause(own: dict[str, object], wait_only: bool) -> dict[str, object] | None:
    """Claim the first place for `own`, or, when it is only a consequence, wait a little for whoever claims it."""
    try:
        store = connect_store(FAILURE_PREFIX)
        deadline = time.monotonic() + _WAIT_S
        while wait_only and not store.check([FAILURE_KEY]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        winner: dict[str, object] = json.loads(store.compare_set(FAILURE_KEY, "", json.dumps(own)))
    except (RuntimeError, ValueError, OSError):
        return None  # the store went down with rank 0's node
    return winner
