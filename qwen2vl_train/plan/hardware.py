"""The machine to plan for: how many GPUs, how much memory each has, how fast it computes.

Enters: a name or figures. Leaves: `Hardware`. Memory is what the maker sells (GB of 10^9 bytes); `USABLE` of it can
hold tensors: the rest goes to the CUDA context, NCCL's buffers, kernels' workspaces and the allocator's fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen2vl_train.config import ConfigError
from qwen2vl_train.model.cost import PEAKS

USABLE = 0.9
MEMORY_GB = {"A100": 80.0, "A800": 80.0, "H100": 80.0, "H800": 80.0, "H200": 141.0, "B200": 180.0}


@dataclass(frozen=True)
class Hardware:
    """`gpus` of `memory_gb` each, `peak_flops` operations per second each in the run's precision (None: not known)."""

    name: str
    gpus: int
    memory_gb: float
    peak_flops: float | None

    @property
    def usable_bytes(self) -> float:
        """What tensors may take on one GPU."""
        return USABLE * self.memory_gb * 1e9


def find_hardware(
    name: str, gpus: int, precision: str, memory_gb: float | None = None, peak_flops: float | None = None
) -> Hardware:
    """The named GPU with its figures, or with those that are given instead.

    Raises:
        ConfigError: an unknown name without `memory_gb`, or figures that cannot be.
    """
    known = next((key for key in MEMORY_GB if key.lower() == name.lower()), None)
    if known is None and memory_gb is None:
        raise ConfigError(f"--gpu {name}: known are {', '.join(MEMORY_GB)}; give --gpu-memory GB (and --peak-flops)")
    for option, value in (("--gpus", gpus), ("--gpu-memory", memory_gb), ("--peak-flops", peak_flops)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option}={value}: must be finite and above 0")
    memory = memory_gb if memory_gb is not None else MEMORY_GB[known or ""]
    if peak_flops is None and known is not None:
        peak_flops = dict(PEAKS)[known][0 if precision == "bf16" else 1]
    return Hardware(known or name, gpus, memory, peak_flops)
