"""Scenes of the demo pictures: what is in a picture and where, without a pixel drawn.

In:   a random generator and the stencils that tell how large a drawn word is.
Out:  a `Scene`: size, background, 1 to 3 coloured shapes in reading order (left to right), perhaps one word.
Cost: about 50 µs. A layout that does not fit after 40 tries loses a shape; the first shape always fits.

Colours and shapes are few and told apart by hue, and backgrounds are nearly grey, so that a model of a million
parameters can learn them in minutes; places, sizes, aspect ratios and backgrounds vary freely.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from data_pipelines.sources.demo_stencils import Stencils

Rgb = tuple[int, int, int]
Box = tuple[int, int, int, int]
Suffix = Literal["jpg", "png"]

COLORS: dict[str, Rgb] = {
    "red": (220, 30, 30),
    "green": (20, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 20),
    "purple": (150, 40, 190),
    "cyan": (20, 205, 220),
}
SHAPES = ("square", "ring", "cross")  # told apart by what they leave out, not by their corners alone
# Words of two to five letters: their lengths can be seen first, the letters after. Of 49 words of three letters,
# 16 pixels high and anywhere in the picture, a ViT of the tiny model's size learnt none in 17,000 pictures.
WORDS = (
    *("GO", "UP", "NO", "ON", "WE", "MY"),
    *("BUS", "CAT", "ZOO", "KEY", "SUN", "FOX"),
    *("STOP", "TAXI", "PARK", "BANK", "CAFE", "SHOP"),
    *("HOTEL", "PIZZA", "MUSIC", "WATER", "RADIO", "BREAD"),
)

# Boxes lie on a grid of 20 x 20 cells, so their coordinates are multiples of 50 of 1000: the last digits, which a
# picture of a hundred pixels cannot tell apart, would otherwise be noise in most of what a grounding answer teaches.
CELLS = 20
SIDES = (80, 100, 120, 140, 160)  # pixels, whole cells; cost grows with the area, so small ones are more frequent
MIN_SHAPE, MAX_SHAPE = 34, 64  # pixels: two to four patches across
MIN_WORD_SIDE = 100  # pixels of a picture with a word
WORD_SIZE = 30  # of the font, pixels
GAP = 4  # pixels between things
READING_GAP = 16  # centres of two shapes differ by this much, so that "left to right" is never a matter of taste


@dataclass(frozen=True, slots=True)
class Shape:
    """A coloured shape that fills the `box` (x1, y1, x2, y2), pixels, right and bottom exclusive."""

    color: str
    kind: str
    box: Box

    @property
    def phrase(self) -> str:
        """Colour and kind, as every answer names it."""
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the box's middle, pixels."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True, slots=True)
class Word:
    """A word on a plate: `box` of the plate, `quad` of the letters, clockwise from the first one's top left, pixels."""

    text: str
    size: int
    angle_deg: int
    box: Box
    quad: tuple[float, float, float, float, float, float, float, float]


@dataclass(frozen=True, slots=True)
class Background:
    """A nearly grey ground: "plain", "gradient_x", "gradient_y" or "stripes" of `first` and `second`, or "noise"."""

    style: str
    first: Rgb
    second: Rgb
    period: int
    seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture. `shapes` run from left to right; `ink` is the jitter added to each shape's colour."""

    width: int
    height: int
    background: Background
    shapes: tuple[Shape, ...]
    inks: tuple[Rgb, ...]
    word: Word | None
    suffix: Suffix


def sample_scene(rng: Random, stencils: Stencils, *, num_shapes: int | None = None, word: bool = False) -> Scene:
    """A random scene. `num_shapes` None: one or two, sometimes three; `word`: with one word."""
    width, height = (sample_side(rng) if not word else max(sample_side(rng), MIN_WORD_SIDE) for _ in range(2))
    wanted = num_shapes or rng.choices((1, 2, 3), (58, 38, 4))[0]
    taken: list[Box] = []
    drawn_word = _place_word(rng, stencils, width, height) if word else None
    if drawn_word is not None:
        taken.append(drawn_word.box)
    boxes = _place_shapes(rng, width, height, wanted, taken)
    pairs = rng.sample([(color, kind) for color in COLORS for kind in SHAPES], len(boxes))
    shapes = tuple(Shape(color, kind, box) for (color, kind), box in zip(pairs, boxes, strict=True))
    return Scene(
        width=width,
        height=height,
        background=sample_background(rng),
        shapes=tuple(sorted(shapes, key=lambda shape: shape.center)),
        inks=tuple(_jitter(rng, 18) for _ in shapes),
        word=drawn_word,
        suffix="png" if rng.random() < 0.2 else "jpg",
    )


def sample_side(rng: Random) -> int:
    """A side in pixels: 80 to 160, mean 112; mostly 100 or 120, four LLM tokens long."""
    return rng.choices(SIDES, (1, 5, 5, 1, 1))[0]


def sample_background(rng: Random) -> Background:
    """A dark or a light background; its colours stay far from those of the shapes."""
    level = rng.randint(25, 85) if rng.random() < 0.25 else rng.randint(170, 230)
    tint = _jitter(rng, 14)
    step = rng.choice((-1, 1)) * rng.randint(8, 18)
    first = (level + tint[0], level + tint[1], level + tint[2])
    second = (first[0] + step, first[1] + step, first[2] + step)
    style = rng.choices(("plain", "gradient_x", "gradient_y", "stripes", "noise"), (5, 2, 2, 1, 1))[0]
    return Background(style, first, second, rng.randint(8, 20), rng.randrange(1 << 30))


def _jitter(rng: Random, limit: int) -> Rgb:
    return rng.randint(-limit, limit), rng.randint(-limit, limit), rng.randint(-limit, limit)


def _place_word(rng: Random, stencils: Stencils, width: int, height: int) -> Word:
    """A sign in the middle of the top or the bottom edge; some turned a little."""
    text = rng.choice(WORDS)
    size = WORD_SIZE
    angle = rng.choice((-5, -3, 3, 5)) if rng.random() < 0.1 else 0
    sign = stencils.word(text, size, angle)
    while sign.ink.shape[1] > width:
        size -= 1
        sign = stencils.word(text, size, angle)
    h, w = sign.ink.shape
    x, y = (width - w) // 2, rng.choice((0, height - h))
    x1, y1, x2, y2, x3, y3, x4, y4 = sign.quad
    quad = (x + x1, y + y1, x + x2, y + y2, x + x3, y + y3, x + x4, y + y4)
    return Word(text, size, angle, (x, y, x + w, y + h), quad)


def _place_shapes(rng: Random, width: int, height: int, wanted: int, taken: list[Box]) -> list[Box]:
    """Up to `wanted` boxes on the grid, apart from each other and from `taken`; one at least."""
    for count in range(wanted, 0, -1):
        for _ in range(40):
            boxes = _try_boxes(rng, width, height, count, taken)
            if boxes is not None:
                return boxes
    # A small picture with a word: the taller of the strips above and below it holds one shape.
    _, y1, _, y2 = taken[0]
    above, below = y1 - GAP, height - y2 - GAP
    side = min(max(above, below), MAX_SHAPE, width)
    columns, rows = max(side, MIN_SHAPE) * CELLS // width, side * CELLS // height
    row = 0 if above >= below else CELLS - rows
    return [_cells(rng.randint(0, CELLS - columns), row, columns, rows, width, height)]


def _try_boxes(rng: Random, width: int, height: int, count: int, taken: list[Box]) -> list[Box] | None:
    boxes: list[Box] = []
    largest = min(MAX_SHAPE, min(width, height) // 2)
    for _ in range(count):
        side = rng.randint(MIN_SHAPE, largest)
        columns, rows = round(side * CELLS / width), round(side * CELLS / height)
        box = _cells(rng.randint(0, CELLS - columns), rng.randint(0, CELLS - rows), columns, rows, width, height)
        middles = ((other[0] + other[2]) / 2 for other in boxes)
        if any(_touch(box, other) for other in (*taken, *boxes)):
            return None
        if any(abs(middle - (box[0] + box[2]) / 2) < READING_GAP for middle in middles):
            return None
        boxes.append(box)
    return boxes


def _cells(column: int, row: int, columns: int, rows: int, width: int, height: int) -> Box:
    """The box, in pixels, of some cells of the grid."""
    x, y = width // CELLS, height // CELLS
    return column * x, row * y, (column + columns) * x, (row + rows) * y


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP
