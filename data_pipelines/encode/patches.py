"""Pixels → uint8 patches in the order the ViT reads them.

Enters: a decoded image uint8 [H, W, 3], or a clip's resized frames uint8 [N, 3, h, w]. Leaves: uint8 rows of 14 x 14
patches. They travel as bytes, without normalisation and without the doubling of a still image in time: the device does
both, and a pack of 16,384 tokens is 39 MB instead of 309 MB of float32.

Order of rows: (t, h/2, w/2, 2, 2): the four patches that the merger makes one LLM token lie next to each other. For a
grid of 4 x 4 patches numbered row by row the rows are 0 1 4 5, 2 3 6 7, 8 9 12 13, 10 11 14 15.
Inside a row: (channel, [frame of the pair,] row, column), as the published Conv3d weight expects.

Cost: the resize is torch's uint8 antialiased bicubic (equal to transformers' fast processor), then one copy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_pipelines.samples import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

IMAGE_PATCH_BYTES = 3 * PATCH_SIZE * PATCH_SIZE  # 588
CLIP_PATCH_BYTES = TEMPORAL_PATCH_SIZE * IMAGE_PATCH_BYTES  # 1176
_BLOCK = PATCH_SIZE * MERGE_SIZE


def resize_image(rgb: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """`rgb` uint8 [H, W, 3] resized to uint8 [3, height, width] (channels-last in memory), antialiased bicubic.

    An image that already has the size is passed through without a copy.
    """
    image = torch.from_numpy(rgb).permute(2, 0, 1)
    if image.shape[1:] == (height, width):
        return image
    # Channels-last uint8 input is the layout of torch's vectorised path: no float image is ever made.
    resized = F.interpolate(image.unsqueeze(0), size=(height, width), mode="bicubic", antialias=True)
    return resized.squeeze(0)


def image_to_patches(image: Tensor) -> Tensor:
    """uint8 [3, h, w] (h, w multiples of 28) → uint8 [h/14 * w/14, 588] in the ViT's order. One copy."""
    _, height, width = image.shape
    blocks = image.numpy().reshape(3, height // _BLOCK, 2, PATCH_SIZE, width // _BLOCK, 2, PATCH_SIZE)
    # (C, h/2, mh, ph, w/2, mw, pw) → (h/2, w/2, mh, mw, C, ph, pw). numpy's copy of bytes is 1.6 times torch's here.
    rows = np.ascontiguousarray(blocks.transpose(1, 4, 2, 5, 0, 3, 6))
    return torch.from_numpy(rows.reshape(-1, IMAGE_PATCH_BYTES))


def clip_to_patches(frames: Tensor) -> Tensor:
    """uint8 [N, 3, h, w] (N even; h, w multiples of 28) → uint8 [N/2 * h/14 * w/14, 1176], ViT's order. One copy."""
    num_frames, _, height, width = frames.shape
    steps = num_frames // TEMPORAL_PATCH_SIZE
    blocks = frames.numpy().reshape(
        steps, TEMPORAL_PATCH_SIZE, 3, height // _BLOCK, 2, PATCH_SIZE, width // _BLOCK, 2, PATCH_SIZE
    )
    # (t, T2, C, h/2, mh, ph, w/2, mw, pw) → (t, h/2, w/2, mh, mw, C, T2, ph, pw)
    rows = np.ascontiguousarray(blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8))
    return torch.from_numpy(rows.reshape(-1, CLIP_PATCH_BYTES))
