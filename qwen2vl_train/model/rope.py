"""Rotary positions: M-RoPE of the decoder (time, row, column) and 2D-RoPE of the vision transformer.

Enters: integer positions. Leaves: cosines and sines [T, head_dim / 2] in float32, and queries and keys rotated by
them. Frequencies are computed in float32 in every forward pass and never kept as buffers: DeepSpeed's `zero.Init` turns
float buffers into bf16, which is 4.6 rad off at position 4,000.

Legend: T tokens, P patches, H heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def inverse_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i in 0 .. dim/2 - 1, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def text_rotary(position_ids: Tensor, theta: float, sections: tuple[int, int, int]) -> Rotary:
    """M-RoPE (Qwen2-VL paper, section 2.1): pair i turns by the time, row or column position its section names.

    position_ids int [3, T] -> (cos, sin), float32 [T, sum(sections)]. With sections (16, 24, 24) pairs 0-15 follow
    time, 16-39 the row, 40-63 the column. Where the three rows agree (text) this is ordinary RoPE.
    """
    positions = torch.cat(
        [position_ids[axis, :, None].expand(-1, count) for axis, count in enumerate(sections)], dim=1
    ).float()
    angles = positions * inverse_frequencies(theta, 2 * sum(sections), position_ids.device)
    return angles.cos(), angles.sin()


def vision_rotary(patch_positions: Tensor, theta: float, head_dim: int) -> Rotary:
    """2D-RoPE: the first half of the pairs turns by the patch's row, the second by its column.

    patch_positions int [P, 2] (row, column) -> (cos, sin), float32 [P, head_dim / 2].
    """
    frequencies = inverse_frequencies(theta, head_dim // 2, patch_positions.device)
    angles = (patch_positions[:, :, None].float() * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn pair (i, i + d/2) of every head by its angle, in float32; x [T, H, d] -> [T, H, d], same dtype."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
