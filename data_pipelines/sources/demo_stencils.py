"""Stencils of the demo pictures: how much of each pixel a shape or a word covers.

In:   a shape's name and side, or a word with font size and angle.
Out:  uint8 masks [H, W], 0 (outside) to 255 (inside), cut tight; a word comes as a `Sign`, with its plate and quad.
Cost: about 0.2 ms for a new stencil; a cached one is free. A `Stencils` object holds at most about 2 MB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Mask = NDArray[np.uint8]
Quad = tuple[float, float, float, float, float, float, float, float]

OVERSAMPLING = 4  # shapes are drawn this much larger and averaged: smooth edges
STROKE = 1  # pixels added around each letter: the built-in font is thin
MARGIN = 4  # pixels of plate around a word


@dataclass(frozen=True, slots=True)
class Sign:
    """A word on its plate: masks `plate` and `ink`, uint8 [H, W] both, and the `quad` around the letters.

    The quad is (x1, y1, …, x4, y4) in pixels of the masks, clockwise from the top left corner of the first letter.
    """

    plate: Mask
    ink: Mask
    quad: Quad


class Stencils:
    """Draws stencils and remembers them. One per process; what it returns depends on the arguments alone."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[str, int, int], Mask] = {}
        self._words: dict[tuple[str, int, int], Sign] = {}
        self._fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def shape(self, kind: str, width: int, height: int) -> Mask:
        """The mask uint8 [height, width] of "square", "ring" or "cross", touching all four edges."""
        key = (kind, width, height)
        if key not in self._shapes:
            self._shapes[key] = _draw_shape(kind, width, height)
        return self._shapes[key]

    def word(self, text: str, size: int, angle_deg: int) -> Sign:
        """The sign that carries `text` in a font of `size` pixels, turned counter-clockwise."""
        key = (text, size, angle_deg)
        if key not in self._words:
            self._words[key] = self._draw_word(text, size, angle_deg)
        return self._words[key]

    def _draw_word(self, text: str, size: int, angle_deg: int) -> Sign:
        if size not in self._fonts:
            font = ImageFont.load_default(size)
            if not isinstance(font, ImageFont.FreeTypeFont):
                raise RuntimeError("Pillow was built without FreeType and cannot draw letters at a given size")
            self._fonts[size] = font
        font = self._fonts[size]
        left, top, right, bottom = (round(value) for value in font.getbbox(text, stroke_width=STROKE))
        width, height = right - left + 2 * MARGIN, bottom - top + 2 * MARGIN
        ink = Image.new("L", (width, height))
        ImageDraw.Draw(ink).text((MARGIN - left, MARGIN - top), text, fill=255, font=font, stroke_width=STROKE)
        plate = Image.new("L", (width, height), 255)
        if angle_deg:
            ink, plate = (
                image.rotate(angle_deg, resample=Image.Resampling.BICUBIC, expand=True) for image in (ink, plate)
            )
        quad = _turn_corners(right - left, bottom - top, ink.width, ink.height, angle_deg)
        return Sign(np.asarray(plate), np.asarray(ink), quad)


def _draw_shape(kind: str, width: int, height: int) -> Mask:
    image = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    right, bottom = image.width - 1, image.height - 1
    if kind == "square":
        draw.rectangle((0, 0, right, bottom), fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, right, bottom), fill=255)
        draw.ellipse((right * 30 // 100, bottom * 30 // 100, right * 70 // 100, bottom * 70 // 100), fill=0)
    elif kind == "cross":
        draw.rectangle((right * 32 // 100, 0, right * 68 // 100, bottom), fill=255)
        draw.rectangle((0, bottom * 32 // 100, right, bottom * 68 // 100), fill=255)
    else:
        raise ValueError(f"shape {kind!r}: one of square, ring, cross")
    return np.asarray(image.reduce(OVERSAMPLING))


def _turn_corners(width: int, height: int, new_width: int, new_height: int, angle_deg: int) -> Quad:
    """The corners of a width x height rectangle after a counter-clockwise turn about its centre (y points down)."""
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    half_w, half_h = width / 2, height / 2
    values: list[float] = []
    for x, y in ((-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)):
        values.append(round(min(max(new_width / 2 + x * cos + y * sin, 0.0), new_width), 1))
        values.append(round(min(max(new_height / 2 - x * sin + y * cos, 0.0), new_height), 1))
    x1, y1, x2, y2, x3, y3, x4, y4 = values
    return x1, y1, x2, y2, x3, y3, x4, y4
