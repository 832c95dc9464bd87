"""The scale of a chart's axis: which values it spans, linear or logarithmic, and where its ticks stand.

Enters: the values to show. Leaves: a `Scale` that maps a value to 0 (start) .. 1 (end) and lists round ticks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_RATIO = 20  # values that span more than this factor are read on a logarithmic axis


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; `ticks` lie within."""

    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Where `value` lies: 0 at `low`, 1 at `high`, outside beyond them."""
        if self.logarithmic:
            floor = max(value, self.low)  # a bucket's mean of positive values is positive; zero sticks to the axis
            return math.log(floor / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_scale(values: Sequence[float], num_ticks: int = 5, *, zero: bool = False, top: float | None = None) -> Scale:
    """A linear axis around `values` with ticks at multiples of 1, 2 or 5 x 10^n.

    `zero` starts it at 0; `top` is its largest end (1 for shares).

    >>> linear_scale([3.2, 9.1]).ticks
    (2.0, 4.0, 6.0, 8.0, 10.0)
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = min(0.0, low) if zero else low
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = (low - abs(low) / 10 if low and not zero else low), high + (abs(high) / 10 or 1.0)
    step = _round_step((high - low) / num_ticks)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if top is not None and low < top:
        high = min(high, top)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, False, tuple(number * step for number in range(first, last + 1)))


def log_scale(values: Sequence[float], num_ticks: int = 8) -> Scale:
    """A logarithmic axis around positive `values`, ticks at 1, 2, 5 x 10^n, or at powers of ten where these crowd."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    candidates = [mantissa * 10.0**power for power in range(first, last + 1) for mantissa in (1, 2, 5)]
    low = max(tick for tick in candidates if tick <= low * (1 + 1e-9))
    high = min((tick for tick in candidates if tick >= high * (1 - 1e-9)), default=high)
    ticks = [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    if len(ticks) > num_ticks:
        every = max(1, math.ceil((last - first) / num_ticks))
        powers = [10.0**power for power in range(first, last + 1, every)]
        ticks = [power for power in powers if low * (1 - 1e-9) <= power <= high * (1 + 1e-9)]
    return Scale(low, high, True, tuple(ticks))


def loss_scale(values: Sequence[float]) -> Scale:
    """Logarithmic where positive values span more than `LOG_RATIO`, linear otherwise.

    The start of training would else flatten everything after it.
    """
    if values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        return log_scale(values)
    return linear_scale(values, zero=bool(values) and min(values) >= 0)


def _round_step(raw: float) -> float:
    """The smallest of 1, 2, 5 x 10^n that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(mantissa * power for mantissa in (1, 2, 5, 10) if mantissa * power >= raw * (1 - 1e-9))
