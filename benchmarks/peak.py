"""Peak memory of a call: what it allocated above what was there before.

CPU: from PyTorch's allocation events (exact, unlike resident memory). CUDA: from the caching allocator's statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """Bytes above the start: at the highest moment, and still held at the end."""

    peak_bytes: int
    held_bytes: int


def measure_peak(call: Callable[[], object], device: torch.device | None = None) -> Peak:
    """Run `call` once and measure its allocations on `device` (default: CPU)."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Peak(peak, live)
