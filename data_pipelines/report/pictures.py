"""Patches → pictures: what the model is shown, taken back out of a batch.

Enters: a batch's uint8 patches and grids. Leaves: RGB pixels, and WebP files for a page. The pictures are made from the
very rows the ViT gets, so a wrong order, resize or frame would be seen. Costs a copy, and 5 ms for writing a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipelines.samples import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

Pixels = NDArray[np.uint8]

MAX_SIDE = 1120
FRAME_SIDE = 224
MAX_FRAMES = 48
QUALITY = 82


@dataclass(frozen=True)
class Strip:
    """A clip's frames side by side in one file: `columns` in a row, each `width` x `height`; `shown` frame numbers."""

    columns: int
    width: int
    height: int
    shown: tuple[int, ...]


def unpatch(patches: Tensor, grid_thw: tuple[int, int, int]) -> Pixels:
    """Rows in the ViT's order → frames uint8 [N, h, w, 3]: the inverse of `encode.patches`.

    `patches` [t * h * w, 588] of a still image (N = 1), or [t * h * w, 1176] of a clip (N = 2 * t).
    """
    t, h, w = grid_thw
    frames = patches.shape[1] // (3 * PATCH_SIZE * PATCH_SIZE)
    assert frames in (1, TEMPORAL_PATCH_SIZE), f"rows of {patches.shape[1]} bytes"
    blocks = patches.numpy().reshape(
        t, h // MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE, 3, frames, PATCH_SIZE, PATCH_SIZE
    )
    # (t, h/2, w/2, mh, mw, C, T2, ph, pw) → (t, T2, h/2, mh, ph, w/2, mw, pw, C)
    pixels = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return np.ascontiguousarray(pixels).reshape(t * frames, h * PATCH_SIZE, w * PATCH_SIZE, 3)


def save_picture(pixels: Pixels, path: Path) -> None:
    """Write one picture uint8 [h, w, 3], at most `MAX_SIDE` pixels long."""
    _save(_fit(pixels, MAX_SIDE), path)


def save_strip(frames: Pixels, path: Path) -> Strip:
    """Write the frames uint8 [N, h, w, 3] of a clip into one picture; of a long clip `MAX_FRAMES` in even pairs."""
    pairs = np.unique(np.linspace(0, len(frames) // 2 - 1, min(len(frames) // 2, MAX_FRAMES // 2)).round().astype(int))
    shown = [int(number) for pair in pairs for number in (2 * pair, 2 * pair + 1)]
    small = [np.asarray(_fit(frames[number], FRAME_SIDE)) for number in shown]
    height, width = small[0].shape[:2]
    columns = min(8, len(small))
    sheet = np.zeros((-(-len(small) // columns) * height, columns * width, 3), np.uint8)
    for i, frame in enumerate(small):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = frame
    _save(Image.fromarray(sheet), path)
    return Strip(columns, width, height, tuple(shown))


def _fit(pixels: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "WEBP", quality=QUALITY, method=2)  # half the time of the default, 2% more bytes
