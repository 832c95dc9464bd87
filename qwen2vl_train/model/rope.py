"""Rotary positions: M-RoPE of the decoder (time, row, column) and 2D-RoPE of the vision transformer.

Enters: integer positions. Leaves: cosines and sines [T, 1, head_dim] in float32, and queries and keys rotated by
them. Frequencies are computed in float32 in every forward pass and never kept as buffers: DeepSpeed's `zero.Init` turns
float buffers into bf16, which is 4.6 rad off at position 4,000.

Legend: T tokens, P patches, H heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotary = tuple[Tensor, Tensor]


def inverse_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """theta^(-2i / dim) for i in 0 .. dim/2 - 1, float32 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)


def text_rotary(position_ids: Tensor, theta: float, sections: tuple[int, int, int]) -> Rotary:
    """M-RoPE (Qwen2-VL paper, section 2.1): pair i turns by the time, row or column position its section names.

    position_ids int [3, T] -> float32 (cos, sin), see `_rotary`. With sections (16, 24, 24) pairs 0-15 follow
    time, 16-39 the row, 40-63 the column. Where the three rows agree (text) this is ordinary RoPE.
    """
    positions = torch.cat(
        [position_ids[axis, :, None].expand(-1, count) for axis, count in enumerate(sections)], dim=1
    ).float()
    return _rotary(positions * inverse_frequencies(theta, 2 * sum(sections), position_ids.device))


def vision_rotary(patch_positions: Tensor, theta: float, head_dim: int) -> Rotary:
    """2D-RoPE: the first half of the pairs turns by the patch's row, the second by its column.

    patch_positions int [P, 2] (row, column) -> float32 (cos, sin), see `_rotary`.
    """
    frequencies = inverse_frequencies(theta, head_dim // 2, patch_positions.device)
    return _rotary((patch_positions[:, :, None].float() * frequencies).flatten(1))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn pair (i, i + d/2) of every head by its angle, in float32; x [T, H, d] -> [T, H, d], same dtype."""
    rotated: Tensor = _Rotate.apply(x, *rotary)  # type: ignore[no-untyped-call]
    return rotated


def _rotary(angles: Tensor) -> Rotary:
    """Angles [T, d/2] -> (cos, cos) and (-sin, sin), [T, 1, d] each: ready for `_turn`, the same for all heads."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin); direction -1 turns back."""
    first, second = x.chunk(2, dim=-1)
    # three passes over the data instead of the seven of the formula's plain spelling
    turned = torch.cat((second, first), dim=-1).float().mul_(sin if direction > 0 else -sin)
    return turned.addcmul_(x.float(), cos).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is turned back by the same angle: nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Take x [T, H, d], cos and sin float32 [T, 1, d] -> [T, H, d]."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x [T, H, d]."""
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None
