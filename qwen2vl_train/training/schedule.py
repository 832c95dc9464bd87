"""Learning-rate schedule: a pure function of the position in the stage, so a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from qwen2vl_train.config import ScheduleConfig


def rate_factor(done: int, length: int, config: ScheduleConfig, unit: int = 1) -> float:
    """The factor on every group's peak rate for the update that begins after `done` of the stage's `length`.

    Counted in steps (`unit` 1), or in tokens: then `unit` is about what one step trains, its packs' capacity.
    Warm-up rises linearly and reaches 1 at `warmup`; its first update already moves: (0 + unit) / (warmup + unit).
    The decay ends at `min_ratio` with the last step.

    >>> [round(rate_factor(s, 5, ScheduleConfig("linear", warmup_steps=1, min_ratio=0.0)), 2) for s in range(5)]
    [0.5, 1.0, 0.67, 0.33, 0.0]
    """
    warmup = config.warmup_steps or config.warmup_tokens  # a stage has the one of its unit
    if done < warmup:
        return (done + unit) / (warmup + unit)
    if config.kind == "constant":
        return 1.0
    progress = min(1.0, (done - warmup) / max(1, length - unit - warmup))
    remaining = 1.0 - progress if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_ratio + (1.0 - config.min_ratio) * remaining
