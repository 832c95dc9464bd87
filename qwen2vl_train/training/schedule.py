"""Learning-rate schedule: a pure function of the step, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from qwen2vl_train.config import ScheduleConfig


def rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The factor on every group's peak rate for the update number `step` (0-based) of `total_steps`.

    Warm-up rises linearly and reaches 1 at step `warmup_steps`; its first update already moves: (0 + 1) / (warmup + 1).
    The decay ends at `min_ratio` on the last step.

    >>> [round(rate_factor(s, 5, ScheduleConfig("linear", warmup_steps=1, min_ratio=0.0)), 2) for s in range(5)]
    [0.5, 1.0, 0.67, 0.33, 0.0]
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.kind == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    remaining = 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_ratio + (1.0 - config.min_ratio) * remaining
