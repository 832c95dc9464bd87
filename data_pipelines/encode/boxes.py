"""Boxes and quads: pixels of the stored image ↔ the text Qwen2-VL reads and writes.

A coordinate is an integer in [0, 1000), relative to the image as displayed, so that resizing does not change it:
v = min(999, floor(1000 * x / size)), read back as the middle of its cell, (v + 0.5) / 1000 * size.
A box is written "(x1,y1),(x2,y2)", a quad "(x1,y1),(x2,y2),(x3,y3),(x4,y4)"; the tags around them belong to `chat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

GridPoints = tuple[tuple[int, int], ...]
GRID = 1000
_POINT = r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)"
_SEPARATOR = r"\s*,?\s*"
_BOX = re.compile(_POINT + _SEPARATOR + _POINT)
_QUAD = re.compile(_SEPARATOR.join([_POINT] * 4))
_TAGGED_QUAD = re.compile(r"<\|quad_start\|>.*?<\|quad_end\|>", re.DOTALL)


def to_grid(value: float, size: int) -> int:
    """A pixel coordinate on the grid: an integer in [0, 1000); coordinates outside the image stick to its border.

    >>> to_grid(319.5, 640), to_grid(640, 640), to_grid(-2, 640)
    (499, 999, 0)
    """
    return min(GRID - 1, max(0, math.floor(GRID * value / size)))


def to_pixels(value: int, size: int) -> float:
    """The pixel coordinate at the middle of grid cell `value` of an image side of `size` pixels."""
    return (value + 0.5) / GRID * size


def box_points(box: Sequence[float], width: int, height: int) -> GridPoints:
    """Box (x1, y1, x2, y2) in pixels → its two corners on the grid, top left first whatever the order given."""
    x1, y1, x2, y2 = box
    left, right = sorted((to_grid(x1, width), to_grid(x2, width)))
    top, bottom = sorted((to_grid(y1, height), to_grid(y2, height)))
    return ((left, top), (right, bottom))


def quad_points(quad: Sequence[float], width: int, height: int) -> GridPoints:
    """Quad (x1, y1, ..., x4, y4) in pixels → its four corners on the grid, in the order given."""
    return tuple((to_grid(x, width), to_grid(y, height)) for x, y in zip(quad[0::2], quad[1::2], strict=True))


def points_text(points: GridPoints) -> str:
    """Points as the model reads and writes them: "(x1,y1),(x2,y2)"."""
    return ",".join(f"({x},{y})" for x, y in points)


def box_text(box: Sequence[float], width: int, height: int) -> str:
    """Box (x1, y1, x2, y2) in pixels → "(x1,y1),(x2,y2)" on the grid."""
    return points_text(box_points(box, width, height))


def quad_text(quad: Sequence[float], width: int, height: int) -> str:
    """Quad (x1, y1, ..., x4, y4) in pixels → "(x1,y1),(x2,y2),(x3,y3),(x4,y4)" on the grid."""
    return points_text(quad_points(quad, width, height))


def parse_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """All boxes in a model's `text`, on the grid, in order; spaces are tolerated, values of 1000 and more are not.

    Points between quad tags are left out; without tags four points in a row read as two boxes.
    """
    boxes = [(int(a), int(b), int(c), int(d)) for a, b, c, d in _BOX.findall(_TAGGED_QUAD.sub("", text))]
    return [box for box in boxes if max(box) < GRID]


def parse_quads(text: str) -> list[tuple[int, ...]]:
    """All quads (8 integers each) in a model's `text`, on the grid, in order; values of 1000 and more are refused."""
    quads = [tuple(int(value) for value in groups) for groups in _QUAD.findall(text)]
    return [quad for quad in quads if max(quad) < GRID]
