"""A held-out sample as it is shown to people: in wandb's table and in the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_SIDE = 560  # pixels: as large as the report draws a picture


@dataclass(frozen=True)
class Box:
    """A box to draw on a picture: fractions of its size (0 to 1), a caption, and whether it is the prediction."""

    xyxy: tuple[float, float, float, float]
    caption: str
    predicted: bool


@dataclass(frozen=True)
class Shown:
    """One held-out picture for the table: RGB array uint8 [H, W, 3], prompt, truth and prediction, boxes of both.

    H and W are at most `MAX_SIDE`: it travels between ranks.
    """

    task: str
    key: str
    picture: Any
    prompt: str
    truth: str
    prediction: str
    correct: bool
    boxes: tuple[Box, ...] = field(default_factory=tuple)
