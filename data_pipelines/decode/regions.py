"""Boxes and quads of a record: form, order of corners, and bounds against the picture's size.

Coordinates are pixels of the stored picture as displayed. A coordinate may lie up to one pixel outside (annotation
tools round) and is then moved to the border; further out, the sample is refused: a box in other units or of another
picture would teach wrong places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from data_pipelines.decode.fields import coordinates, fail
from data_pipelines.samples import Media, Record, Region

Box = tuple[float, float, float, float]
Quad = tuple[float, float, float, float, float, float, float, float]

TOLERANCE_PIXELS = 1.0


def read_box(key: str, field: str, value: object) -> Box:
    """(x1, y1, x2, y2) with x1 < x2 and y1 < y2, none below zero.

    Raises:
        RecordError: reason "bad_box". Reversed corners are not swapped: they are the mark of another convention
            ((x, y, width, height), say), which a swap would hide.
    """
    x1, y1, x2, y2 = box = coordinates(key, field, value, 4)
    if x2 <= x1 or y2 <= y1:
        fail(key, field, list(box), "needs x1 < x2 and y1 < y2 (is it x, y, width, height?)", "bad_box")
    return cast(Box, _not_negative(key, field, box))


def read_quad(key: str, field: str, value: object) -> Quad:
    """Four corners (x1, y1, ..., x4, y4) that span an area; their order is kept."""
    quad = coordinates(key, field, value, 8)
    if max(quad[0::2]) <= min(quad[0::2]) or max(quad[1::2]) <= min(quad[1::2]):
        fail(key, field, list(quad), "its corners span no area", "bad_box")
    return cast(Quad, _not_negative(key, field, quad))


def _not_negative(key: str, field: str, values: tuple[float, ...]) -> tuple[float, ...]:
    if min(values) < -TOLERANCE_PIXELS:
        fail(key, field, list(values), "has a negative coordinate", "bad_box")
    return tuple(max(0.0, value) for value in values) if min(values) < 0 else values


def check_bounds(record: Record, medias: Mapping[str, Media]) -> Record:
    """The record with every box and quad inside its picture, as far as `medias` knows the picture's size.

    Raises:
        RecordError: reason "bad_box", where a coordinate is more than a pixel outside.
    """
    moved: dict[tuple[int, int], Region] = {}
    for i, message in enumerate(record.messages):
        for j, part in enumerate(message.parts):
            if isinstance(part, Region) and part.name in medias:
                inside = _bounded(record.key, (i, j), part, medias[part.name])
                if inside is not part:
                    moved[i, j] = inside
    if not moved:
        return record
    messages = tuple(
        replace(message, parts=tuple(moved.get((i, j), part) for j, part in enumerate(message.parts)))
        for i, message in enumerate(record.messages)
    )
    return replace(record, messages=messages)


def _bounded(key: str, place: tuple[int, int], region: Region, media: Media) -> Region:
    """`region` itself where all of it lies inside; `place` is its message and part, for the error."""
    shapes = (*region.boxes, *region.quads)
    if all(max(shape[0::2]) <= media.width and max(shape[1::2]) <= media.height for shape in shapes):
        return region
    field = f"messages[{place[0]}].content[{place[1]}]"
    boxes = tuple(_inside(key, f"{field}.boxes[{i}]", box, media) for i, box in enumerate(region.boxes))
    quads = tuple(_inside(key, f"{field}.quads[{i}]", quad, media) for i, quad in enumerate(region.quads))
    return replace(region, boxes=cast("tuple[Box, ...]", boxes), quads=cast("tuple[Quad, ...]", quads))


def _inside(key: str, field: str, values: tuple[float, ...], media: Media) -> tuple[float, ...]:
    width, height = media.width, media.height
    right, bottom = max(values[0::2]), max(values[1::2])
    if right <= width and bottom <= height:
        return values
    if right > width + TOLERANCE_PIXELS or bottom > height + TOLERANCE_PIXELS:
        fail(key, field, list(values), f"outside {media.name}, which is {width} x {height} pixels", "bad_box")
    moved = tuple(min(value, (width, height)[i % 2]) for i, value in enumerate(values))
    if min(moved[0::2]) >= max(moved[0::2]) or min(moved[1::2]) >= max(moved[1::2]):
        fail(key, field, list(values), f"has no area inside {media.name}, {width} x {height} pixels", "bad_box")
    return moved
