"""The vision transformer: uint8 patches of images and clips of any size -> features in the decoder's width.

Enters: patches as they travel (uint8, one frame of a still image, two of a clip), their places, the segments inside
which they attend (one temporal step of one media item). Leaves: one feature per 2 x 2 patches, [P / 4, hidden].
Names are those of the published checkpoints (`visual.*`). A frozen transformer runs without autograd.

Legend: P patches, W width (`embed_dim`), H heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from data_pipelines.samples import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from qwen2vl_train.model.attention import Segments, attend
from qwen2vl_train.model.config import NUM_CHANNELS, VisionConfig
from qwen2vl_train.model.pointwise import quick_gelu
from qwen2vl_train.model.rope import Rotary, rotate, vision_rotary

# CLIP's normalisation, as in the published preprocessor
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
LAYER_NORM_EPS = 1e-6


def normalise(patches: Tensor) -> Tensor:
    """(value / 255 - mean) / std per channel, float32; uint8 [P, 3 * n] with the channel slowest -> [P, 3 * n]."""
    size = patches.shape[1] // NUM_CHANNELS
    # filled on the device: a tensor built from a list would be copied there, which makes the host wait
    scale, shift = (
        torch.cat([torch.full((size,), value, device=patches.device) for value in values])
        for values in (
            [1.0 / (255.0 * std) for std in IMAGE_STD],
            [-mean / std for mean, std in zip(IMAGE_MEAN, IMAGE_STD, strict=True)],
        )
    )
    return torch.addcmul(shift, patches.float(), scale)


class PatchProjection(nn.Module):
    """The 3D convolution over patches, which do not overlap: a matrix product. Its weight keeps the published shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, NUM_CHANNELS, TEMPORAL_PATCH_SIZE, PATCH_SIZE, PATCH_SIZE))

    def forward(self, image_patches: Tensor, video_patches: Tensor) -> Tensor:
        """uint8 [P_i, 588] and [P_v, 1176] -> [P_i + P_v, W].

        A still image is two identical frames to the published model; the sum of the kernel over time gives the same
        for one frame, at half the work.
        """
        dtype = self.weight.dtype
        rows = []
        if image_patches.shape[0] or not video_patches.shape[0]:
            rows.append(F.linear(normalise(image_patches).to(dtype), self.weight.sum(2).flatten(1)))
        if video_patches.shape[0]:
            rows.append(F.linear(normalise(video_patches).to(dtype), self.weight.flatten(1)))
        return rows[0] if len(rows) == 1 else torch.cat(rows)


class PatchEmbed(nn.Module):
    """Holds the projection under its published name, `patch_embed.proj`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = PatchProjection(width)

    def forward(self, image_patches: Tensor, video_patches: Tensor) -> Tensor:
        """uint8 [P_i, 588] and [P_v, 1176] -> [P_i + P_v, W]."""
        features: Tensor = self.proj(image_patches, video_patches)
        return features


class VisionAttention(nn.Module):
    """Full attention inside each segment, with 2D-RoPE; query, key and value in one projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, rotary: Rotary, segments: Segments) -> Tensor:
        """Take x [P, W] -> [P, W]."""
        qkv = self.qkv(x).unflatten(1, (3 * self.num_heads, -1))
        # queries and keys lie side by side: one rotation serves both
        query, key = rotate(qkv[:, : 2 * self.num_heads], rotary).chunk(2, dim=1)
        # a copy, so that attention keeps these values for backward and not all of qkv beside the rotated two thirds
        value = qkv[:, 2 * self.num_heads :].contiguous()
        mixed = attend(query, key, value, segments, causal=False)
        out: Tensor = self.proj(mixed.flatten(1))
        return out


class VisionMlp(nn.Module):
    """Two layers with QuickGELU between them; [P, W] -> [P, W]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Take x [P, W] -> [P, W]."""
        out: Tensor = self.fc2(quick_gelu(self.fc1(x)))
        return out


class VisionBlock(nn.Module):
    """One pre-norm transformer layer; [P, W] -> [P, W]. `inner` does the work, so that it can be compiled alone."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)
        self.inner = self._layer

    def forward(self, x: Tensor, rotary: Rotary, segments: Segments) -> Tensor:
        """Take x [P, W] -> [P, W]."""
        return self.inner(x, rotary, segments)

    def _layer(self, x: Tensor, rotary: Rotary, segments: Segments) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary, segments)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerger(nn.Module):
    """2 x 2 neighbouring patches become one feature of the decoder's width; [P, W] -> [P / 4, hidden]."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.merged_size = width * MERGE_SIZE**2
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_size, self.merged_size), nn.GELU(), nn.Linear(self.merged_size, hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take x [P, W], patches in the ViT's order -> [P / 4, hidden]."""
        # patches come in 2 x 2 blocks, so four neighbouring rows are one block
        features: Tensor = self.mlp(self.ln_q(x).reshape(-1, self.merged_size))
        return features


@dataclass(frozen=True)
class Patches:
    """What the vision transformer reads of a pack, in its order: still images first, then clips.

    image uint8 [P_i, 588], video uint8 [P_v, 1176], positions int [P, 2] (row, column), segments over the P patches.
    """

    image: Tensor
    video: Tensor
    positions: Tensor
    segments: Segments


class VisionTransformer(nn.Module):
    """Patches -> features. `checkpointing` n recomputes every n-th block in backward (0: none, 1: all)."""

    def __init__(self, config: VisionConfig, hidden_size: int, checkpointing: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config.embed_dim, hidden_size)

    def forward(self, patches: Patches) -> Tensor:
        """Features [P / 4, hidden] in the order of the patches."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains()):
            x = self._transform(patches)
        features: Tensor = self.merger(x)
        return features

    def _trains(self) -> bool:
        """Whether anything below the merger trains; if not, no activation is kept."""
        below = (self.patch_embed, *self.blocks)
        return any(parameter.requires_grad for module in below for parameter in module.parameters())

    def _transform(self, patches: Patches) -> Tensor:
        x = self.patch_embed(patches.image, patches.video)
        rotary = vision_rotary(patches.positions, self.config.rope_theta, self.config.head_dim)
        for index, block in enumerate(self.blocks):
            if self.checkpointing and index % self.checkpointing == 0 and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, patches.segments, use_reentrant=False)
            else:
                x = block(x, rotary, patches.segments)
        out: Tensor = x
        return out
