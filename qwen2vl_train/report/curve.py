"""Curves from metric lines: points for a chart, thinned so that thousands of lines stay a light page.

Enters: (x, y) points in order of x. Leaves: at most `MAX_POINTS` points per curve. A longer curve is cut into buckets
of equal counts: the line shows each bucket's mean, a band spans its lowest and highest value, so no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_POINTS = 600  # about one per pixel of a chart


@dataclass(frozen=True)
class Point:
    """`x` in steps; `y` the value, or a bucket's mean between its `low` and `high`."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `color` numbers the page's palette; `non_finite` holds the x of values that were NaN or inf.

    `num_logged` counts the values before thinning.
    """

    label: str
    color: int
    points: tuple[Point, ...]
    non_finite: tuple[float, ...]
    num_logged: int

    @property
    def thinned(self) -> bool:
        return self.num_logged > len(self.points) + len(self.non_finite)


def make_curve(label: str, color: int, values: Sequence[tuple[float, float]], max_points: int = MAX_POINTS) -> Curve:
    """A curve through (x, y) `values` in order of x; values that are not finite are set apart."""
    finite = [(x, y) for x, y in values if math.isfinite(y)]
    lost = tuple(x for x, y in values if not math.isfinite(y))
    return Curve(label, color, thin(finite, max_points), lost, len(values))


def thin(values: Sequence[tuple[float, float]], max_points: int) -> tuple[Point, ...]:
    """At most `max_points` buckets of neighbouring values; the first and the last value keep a point of their own.

    >>> [(point.x, point.y, point.high) for point in thin([(1, 9.0), (2, 3.0), (3, 5.0), (4, 1.0)], 3)]
    [(1.0, 9.0, 9.0), (2.5, 4.0, 5.0), (4.0, 1.0, 1.0)]
    """
    if len(values) <= max_points:
        return tuple(Point(x, y, y, y) for x, y in values)
    inner, num_buckets = len(values) - 2, max_points - 2
    edges = [1 + inner * number // num_buckets for number in range(num_buckets + 1)]
    buckets = [values[start:end] for start, end in pairwise(edges)]
    return tuple(_merge(bucket) for bucket in (values[:1], *buckets, values[-1:]))


def _merge(bucket: Sequence[tuple[float, float]]) -> Point:
    heights = [y for _, y in bucket]
    mean_x = sum(x for x, _ in bucket) / len(bucket)
    return Point(mean_x, sum(heights) / len(heights), min(heights), max(heights))
