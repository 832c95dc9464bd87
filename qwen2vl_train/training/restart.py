"""Whether a launcher has started this run again by itself, and as part of which job.

Enters: the environment that torchrun (`--max-restarts`) and SLURM (a requeue) set. Leaves: two words; a run that nobody
asked for anew must not begin anew, although its command line still says so.
"""

from __future__ import annotations

import os


def is_restart() -> bool:
    """Whether torchrun or SLURM counts an earlier start of the same job. Ranks may differ: torchrun counts per node."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def job() -> str:
    """The job that this process belongs to, the same in all its restarts; empty without a launcher that has a name."""
    for launcher, name in (("slurm", "SLURM_JOB_ID"), ("torchrun", "TORCHELASTIC_RUN_ID")):
        if value := os.environ.get(name):
            return f"{launcher} {value}"
    return ""
