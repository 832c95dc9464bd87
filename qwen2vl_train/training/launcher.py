"""The launcher's process on this machine: it ends this rank when another one fails, and starts it again.

Enters: the environment of torchrun and of the deepspeed launcher, and the parent's process number. Leaves: whether that
process is gone (`kill -9`, out of memory). Its ranks would train on with nobody to answer for them, beside those of the
next start. A rank started by hand (its shell may end under nohup) or by SLURM, which clears away its steps' processes
itself, has no such process. torchrun also takes a text with which its closing words end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.whole import write_whole

# what only ranks of that launcher find in their environment
_SIGNS = {"torchrun": ("TORCHELASTIC_RUN_ID",), "the deepspeed launcher": ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")}


@dataclass(frozen=True)
class Launcher:
    """`name` for people, and its process: this rank's parent."""

    name: str
    process: int

    @property
    def is_gone(self) -> bool:
        """Whether it has ended: an orphan's parent is another one."""
        return os.getppid() != self.process


def find_launcher() -> Launcher | None:
    """The launcher that answers for this process, if one does; to be asked soon, while it surely lives."""
    names = [name for name, signs in _SIGNS.items() if all(sign in os.environ for sign in signs)]
    return Launcher(names[0], os.getppid()) if names else None


def leave_for_torchrun(text: str, time_s: float, environment: Mapping[str, str] = os.environ) -> None:
    """Write torchrun's error file of the rank with this `environment`, as its ErrorHandler does; without torchrun none.

    Of several ranks' texts torchrun shows the one with the earliest `time_s`, in whole seconds since 1970.
    """
    path = environment.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time_s))}
        with suppress(OSError):  # whole, because torchrun may read it at any moment
            write_whole(Path(path), json.dumps({"message": {"message": text, "extraInfo": extra}}), flush=False)
