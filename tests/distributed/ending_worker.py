"""One rank of a run without a model, outside the loop's steps: it fails, stalls or waits for the others.

Usage: ending_worker FOLDER OPTIONS.json    {"fails": rank} raises there, and the other ranks wait without an end, as in
a collective of NCCL; with "collective": true they wait in one of gloo. {"stall_s": s} of the watchdog.
"error": "defect" | "mistake" | "disk": a program's bug, what the user can mend, a full disk, for a plain RuntimeError.
"holds": rank or "all": there C code holds the interpreter instead, "hold_s" seconds under a note of "limit_s" seconds.
"ends": true: the work ends at once, the interpreter does not.   "patch": {constant of the watchdog: value}
Under the watchdog each rank says so on stderr: "rank N works".
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from data_pipelines.errors import MissingFileError
from qwen2vl_train.config import WatchdogConfig
from qwen2vl_train.training import watchdog as watchdog_module
from qwen2vl_train.training.failure import exit_after
from qwen2vl_train.training.watchdog import Watchdog
from qwen2vl_train.training.world import World, start_world


def fail(kind: str) -> None:
    if kind == "defect":
        list(zip([1], [], strict=True))
    if kind == "mistake":
        raise MissingFileError("shards/a.tar: no such file")
    if kind == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/spikes.jsonl")
    raise RuntimeError("the weights are of another model")


def run(world: World, folder: Path, options: dict) -> None:
    with Watchdog(WatchdogConfig(options.get("stall_s", 60), 100), world, folder) as watchdog:
        watchdog.note("loading the model", limit_s=options.get("limit_s"))
        with suppress(OSError):  # a test's full disk
            print(f"rank {world.rank} works", file=sys.stderr, flush=True)
        if options.get("ends"):
            atexit.register(time.sleep, 1000)
            return
        if options.get("holds") in (world.rank, "all"):
            ctypes.PyDLL(None).usleep(int(1e6 * options["hold_s"]))
            return
        if options.get("fails") == world.rank:
            fail(options.get("error", ""))
        if options.get("collective"):
            world.barrier()
        time.sleep(1000)


def main() -> None:
    options = json.loads(sys.argv[2])
    vars(watchdog_module).update(options.get("patch", {}))
    world = start_world(120)
    try:
        run(world, Path(sys.argv[1]), options)
    except Exception as error:
        exit_after(error, world)


main()
