"""A pack as the keyword arguments of transformers' Qwen2-VL model, for training loops other than ours.

Enters: a `PackedBatch` on any device. Leaves: a batch of one packed sequence, pixels normalised, every still image as
two frames. Documents are kept apart by their positions: transformers masks where these restart, but only without a
key-value cache; with one it lets documents see one another and says nothing, hence `use_cache`. Costs what packs were
made to avoid: 8 times the bytes of the uint8 patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipelines.samples import TEMPORAL_PATCH_SIZE, PackedBatch

CHANNELS = 3


def transformers_inputs(batch: PackedBatch) -> dict[str, Any]:
    """`Qwen2VLForConditionalGeneration(**transformers_inputs(batch)).loss` is the mean over the supervised tokens.

    input_ids and labels [1, T]; position_ids [4, 1, T]: places in the document, then M-RoPE's time, row and column;
    pixel_values [P_i, 1176] with image_grid_thw, pixel_values_videos [P_v, 1176] with video_grid_thw, where there are.
    """
    borders = batch.cu_seqlens.long()
    places = torch.arange(batch.num_tokens, device=borders.device) - torch.repeat_interleave(
        borders[:-1], borders.diff()
    )
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[None],
        "labels": batch.labels[None],
        "position_ids": torch.cat([places[None], batch.position_ids])[:, None],
        "use_cache": False,
    }
    if batch.dummy_vision:
        return inputs
    grids = batch.grid_thw.long()
    is_image = grids.prod(1).cumsum(0) <= batch.image_patches.shape[0]  # still images come first
    if is_image.any():
        inputs |= {"pixel_values": _normalise(batch.image_patches, 1), "image_grid_thw": grids[is_image]}
    if not is_image.all():
        frames = TEMPORAL_PATCH_SIZE
        inputs |= {"pixel_values_videos": _normalise(batch.video_patches, frames), "video_grid_thw": grids[~is_image]}
    return inputs


def _normalise(patches: Tensor, frames: int) -> Tensor:
    """uint8 [P, 3 * frames * 196] -> float32 [P, 3 * 2 * 196], CLIP's mean and deviation per channel."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, deviation = (
        torch.tensor(values, device=patches.device).view(1, CHANNELS, 1, 1)
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    pixels = (patches.view(len(patches), CHANNELS, frames, -1) / 255 - mean) / deviation
    return pixels.expand(-1, -1, TEMPORAL_PATCH_SIZE, -1).reshape(len(patches), -1)
