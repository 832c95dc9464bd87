"""Corners of text: one order for all sources, clockwise as displayed, the first corner kept where that is possible."""

from __future__ import annotations

import math

from data_pipelines.decode.fields import coordinates, fail
from data_pipelines.sources.item import Box


def read_corners(key: str, field: str, value: object) -> Box:
    """A quad from 8 numbers, four [x, y] pairs, or a box of 4 numbers (x1, y1, x2, y2), clockwise.

    Raises:
        RecordError: reason "bad_box", for any other number of values (polygons of more corners included).
    """
    if isinstance(value, list) and len(value) == 4 and all(isinstance(point, list) for point in value):
        value = [number for point in value for number in point]
    if isinstance(value, list) and len(value) == 4:
        x1, y1, x2, y2 = coordinates(key, field, value, 4)
        return (x1, y1, x2, y1, x2, y2, x1, y2)
    if not isinstance(value, list):
        fail(key, field, value, "needs 8 numbers", "bad_box")
    return clockwise(coordinates(key, field, value, 8))


def clockwise(quad: Box) -> Box:
    """The quad clockwise on the screen (y grows downwards).

    A counter-clockwise quad is read backwards: bottom left, bottom right, top right, top left (WildReceipt's order)
    becomes top left, top right, bottom right, bottom left. Corners that cross are sorted around their middle, from the
    one nearest to the top left.
    """
    points = list(zip(quad[0::2], quad[1::2], strict=True))
    turned = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True))
    if _crosses(points):
        middle_x, middle_y = sum(x for x, _ in points) / 4, sum(y for _, y in points) / 4
        points.sort(key=lambda point: math.atan2(point[1] - middle_y, point[0] - middle_x))
        first = min(range(4), key=lambda i: (points[i][0] + points[i][1], i))
        points = points[first:] + points[:first]
    elif turned < 0:
        points.reverse()
    return tuple(value for point in points for value in point)


def _crosses(points: list[tuple[float, float]]) -> bool:
    """Whether two opposite sides of the quad cut each other."""
    a, b, c, d = points
    return _cut(a, b, c, d) or _cut(b, c, d, a)


def _cut(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float], d: tuple[float, float]) -> bool:
    return _side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0


def _side(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
