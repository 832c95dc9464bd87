"""FLOPs of a pack, counted from lengths alone: what the model needs, and what our code executes.

Enters: a model's sizes, a pack's lengths, the parts that train. Leaves: floating-point operations of forward and
backward per part (a multiply-add is 2). Attention counts pairs inside documents and segments, never across. Costs
microseconds, so it serves to balance ranks as well as to report the share of the hardware's peak that is used (MFU).
Left out: norms, activations, rotations, softmax: under 1% at the published sizes.

Legend: T tokens, P patches, L supervised positions, W ViT width, D hidden size, I feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from data_pipelines.samples import MERGE_SIZE, PackedBatch
from qwen2vl_train.model.config import NUM_CHANNELS, ModelConfig

IMAGE_ROW = NUM_CHANNELS * 14 * 14
MERGED = MERGE_SIZE * MERGE_SIZE


@dataclass(frozen=True)
class PackLengths:
    """What a pack's cost depends on: tokens of each document, patches of each ViT segment, patches by kind, labels."""

    documents: tuple[int, ...]
    segments: tuple[int, ...]
    image_patches: int
    video_patches: int
    supervised: int

    @classmethod
    def of(cls, batch: PackedBatch) -> PackLengths:
        """Read from a pack in host memory (on a device this would make the host wait)."""
        return cls(
            documents=tuple(batch.cu_seqlens.diff().tolist()),
            segments=tuple(batch.vision_cu_seqlens.diff().tolist()),
            image_patches=int(batch.image_patches.shape[0]),
            video_patches=int(batch.video_patches.shape[0]),
            supervised=batch.num_supervised,
        )

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def patches(self) -> int:
        return self.image_patches + self.video_patches


@dataclass(frozen=True)
class Flops:
    """Operations of one forward and backward pass by part; `head` is the output matrix at supervised positions."""

    vit: int
    merger: int
    llm: int
    head: int

    @property
    def total(self) -> int:
        return self.vit + self.merger + self.llm + self.head


@dataclass(frozen=True)
class Execution:
    """How our code spends more than the model needs; the default is the model's own count.

    `full_squares`: causal attention computes the masked half too (as PyTorch's counter assumes).
    `recomputed_scores`: flash attention's backward recomputes the scores, 5 products instead of 4.
    `*_checkpointing`: every n-th block runs forward again, all but its last matrix.
    """

    full_squares: bool = False
    recomputed_scores: bool = False
    vision_checkpointing: int = 0
    text_checkpointing: int = 0


def pack_flops(
    config: ModelConfig, lengths: PackLengths, trainable: Collection[str], execution: Execution | None = None
) -> Flops:
    """Forward and backward FLOPs of one pack when the parts in `trainable` train.

    A frozen part costs its forward pass, and its backward towards the input where something before it trains: a frozen
    decoder after a trained ViT costs two thirds of a trained one, a frozen ViT one third. Nothing trainable: forward.
    """
    how = execution or Execution()
    vision, text = config.vision, config.text
    width, hidden = vision.embed_dim, config.text.hidden_size
    vit_trains, merger_trains, llm_trains = (part in trainable for part in ("vit", "merger", "llm"))
    reaches_merger = vit_trains or merger_trains
    reaches_llm = reaches_merger or llm_trains

    embed = 2 * IMAGE_ROW * width * (lengths.image_patches + 2 * lengths.video_patches)
    vit_block = 2 * lengths.patches * width * (4 * width + 2 * vision.mlp_dim)
    vit_scores = 4 * width * sum(n * n for n in lengths.segments)
    merger = 2 * (lengths.patches // MERGED) * (MERGED * width) * (MERGED * width + hidden)
    kv_size = text.num_key_value_heads * text.head_dim
    text_block = 2 * lengths.tokens * hidden * (2 * hidden + 2 * kv_size + 3 * text.intermediate_size)
    pairs = sum(n * n if how.full_squares else n * (n + 1) // 2 for n in lengths.documents)
    head = 2 * lengths.supervised * hidden * text.vocab_size

    vit_last = 2 * lengths.patches * width * vision.mlp_dim
    text_last = 2 * lengths.tokens * hidden * text.intermediate_size
    return Flops(
        vit=embed * (1 + vit_trains)
        + _blocks(
            vision.depth,
            (vit_block, vit_scores, vit_last),
            vit_trains,
            vit_trains,
            how.vision_checkpointing,
            how.recomputed_scores,
        ),
        merger=merger * (1 + reaches_merger + merger_trains),
        llm=_blocks(
            text.num_hidden_layers,
            (text_block, 4 * hidden * pairs, text_last),
            reaches_llm,
            llm_trains,
            how.text_checkpointing,
            how.recomputed_scores,
        ),
        head=head * (1 + reaches_llm + llm_trains),
    )


def _blocks(
    depth: int,
    forward: tuple[int, int, int],
    reached: bool,
    trains: bool,
    checkpointing: int,
    recomputed_scores: bool,
) -> int:
    """All layers: forward, backward to the input where `reached`, to the weights where `trains`, recomputation.

    `forward` holds one layer's matrix products, attention scores and values, and last matrix.
    """
    linear, scores, last = forward
    scores_backward = 5 * scores // 2 if recomputed_scores else 2 * scores
    total = depth * (linear * (1 + reached + trains) + scores + reached * scores_backward)
    if checkpointing and reached:
        total += len(range(0, depth, checkpointing)) * (linear + scores - last)
    return total


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, with the untied output matrix among the LLM's: 2B gives 2,208,985,600 in all."""
    vision, text = config.vision, config.text
    width, mlp, hidden = vision.embed_dim, vision.mlp_dim, text.hidden_size
    kv_size = text.num_key_value_heads * text.head_dim
    vit_block = 4 * width * width + 4 * width + 2 * width * mlp + mlp + width + 4 * width
    text_block = (
        2 * hidden * hidden + hidden + 2 * (hidden + 1) * kv_size + 3 * hidden * text.intermediate_size + 2 * hidden
    )
    merged = MERGED * width
    return {
        "vit": 2 * IMAGE_ROW * width + vision.depth * vit_block,
        "merger": 2 * width + merged * merged + merged + merged * hidden + hidden,
        "llm": text.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
        + text.num_hidden_layers * text_block
        + hidden,
    }


def model_flops_utilisation(flops: int, seconds: float, peak_flops: float) -> float:
    """The share of the hardware's peak (operations per second, all devices) that the model's own FLOPs used."""
    return flops / (seconds * peak_flops)


def peak_flops_per_second(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a known accelerator from its maker's data sheet; None where unknown (a CPU has no such figure)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    half = dtype in (torch.bfloat16, torch.float16)
    return next((peaks[0 if half else 1] for known, peaks in PEAKS if known in name), None)


# Peaks of the SXM variants: bf16 on the tensor cores without sparsity, float32 beside them: TF32 is never switched on
PEAKS = (
    ("H200", (989e12, 67e12)),
    ("H100", (989e12, 67e12)),
    ("H800", (989e12, 67e12)),
    ("B200", (2250e12, 75e12)),
    ("A100", (312e12, 19.5e12)),
    ("A800", (312e12, 19.5e12)),
)
