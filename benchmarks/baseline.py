"""transformers' Qwen2-VL fed the same samples: padded batches, or one sample at a time.

Each has two ways to the loss: logits at every position, or only where a label is (hidden states selected, then head).
Pixels arrive normalised and position ids computed, as its processor would deliver them; neither is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from data_pipelines.samples import IGNORE_INDEX, PackedBatch
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.vision import normalise


@dataclass(frozen=True)
class PaddedBatch:
    """Samples as rows, padded on the right to the longest; media of all of them one after the other."""

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    targets: Tensor


def build_reference(config: ModelConfig, attention: str, dtype: torch.dtype, device: torch.device):
    """A random model of the same sizes with `attention` "sdpa" or "eager"."""
    hf_config = Qwen2VLConfig(**config.to_hf())
    hf_config._attn_implementation = attention
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(hf_config).to(dtype)
    return model.train()


def pad_together(samples: Sequence[PackedBatch], device: torch.device, dtype: torch.dtype) -> PaddedBatch:
    """The batch of `samples`, each given as a pack of one document."""
    longest = max(sample.num_tokens for sample in samples)

    def padded(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, longest - values.shape[-1]), value=fill)

    inputs = {
        "input_ids": torch.stack([padded(sample.input_ids, 0) for sample in samples]),
        "position_ids": torch.stack([padded(sample.position_ids, 0) for sample in samples], dim=1),
    }
    if len(samples) > 1:
        inputs["attention_mask"] = torch.stack([padded(torch.ones_like(s.input_ids), 0) for s in samples])
    with_images = [sample for sample in samples if not sample.dummy_vision]
    if with_images:
        frames = torch.cat([sample.image_patches for sample in with_images])
        doubled = normalise(frames).view(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176)
        inputs["pixel_values"] = doubled.to(dtype)
        inputs["image_grid_thw"] = torch.cat([sample.grid_thw for sample in with_images]).long()
    rows = torch.cat([torch.full_like(sample.loss_index, row) for row, sample in enumerate(samples)])
    columns = torch.cat([sample.loss_index for sample in samples])
    targets = torch.cat([sample.loss_targets for sample in samples])
    return PaddedBatch(
        {name: value.to(device) for name, value in inputs.items()},
        rows.to(device),
        columns.to(device),
        targets.to(device),
    )


def reference_step(model: Qwen2VLForConditionalGeneration, batch: PaddedBatch, supervised_only: bool) -> None:
    """Forward and backward of the summed loss."""
    model.zero_grad(set_to_none=True)
    if supervised_only:
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[batch.rows, batch.columns])
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    else:
        logits = model(**batch.inputs, use_cache=False).logits
        labels = torch.full(logits.shape[:2], IGNORE_INDEX, device=logits.device)
        labels[batch.rows, batch.columns] = batch.targets
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
    loss.backward()
