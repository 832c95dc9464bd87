"""Tiny models, random documents and packs, and the transformers model with the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from data_pipelines.pack.collate import collate
from data_pipelines.samples import Encoded, MediaPlan, PackedBatch
from data_pipelines.tokenizer import SpecialTokens
from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.qwen2vl import LogitsRequest, Qwen2VL
from qwen2vl_train.model.vision import normalise
from qwen2vl_train.model.weights import initialise

VOCABULARY = 120
WORDS = VOCABULARY - 13
SPECIAL = SpecialTokens(*range(WORDS, VOCABULARY))

Part = int | tuple[str, tuple[int, int, int]]
"""A number of random words, or a media item: ("image" or "video", grid in patches)."""


def model_config(
    depth: int = 2,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    hidden: int = 64,
    width: int = 32,
    vision_heads: int = 2,
    tied: bool = True,
    section: tuple[int, int, int] = (2, 3, 3),
) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(depth, width, vision_heads),
        text=TextConfig(VOCABULARY, hidden, 96, layers, heads, kv_heads, mrope_section=section),
        tie_word_embeddings=tied,
        bos_token_id=SPECIAL.endoftext,
        eos_token_id=SPECIAL.im_end,
        vision_start_token_id=SPECIAL.vision_start,
        vision_end_token_id=SPECIAL.vision_end,
        image_token_id=SPECIAL.image_pad,
        video_token_id=SPECIAL.video_pad,
    )


def tiny_model(config: ModelConfig | None = None, seed: int = 0, std: float = 0.1, **kwargs) -> Qwen2VL:
    """A model whose norms and biases are random too, so that no gradient hides behind a 0 or a 1."""
    model = Qwen2VL(config or model_config(), **kwargs)
    initialise(model, seed, std=std)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0, std, generator=generator))
    return model


def document(parts: Sequence[Part], seed: int = 0, supervised: float = 1.0, key: str = "doc") -> Encoded:
    """Random words and media in the order of `parts`; the last `supervised` share of the words is learnt."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    plans, patches = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, WORDS, (part,), generator=generator).tolist()
            continue
        kind, grid = part
        plan = MediaPlan(kind, grid, 1 if kind == "image" else 2 * grid[0])
        pad = SPECIAL.image_pad if kind == "image" else SPECIAL.video_pad
        ids += [SPECIAL.vision_start, *[pad] * plan.num_tokens, SPECIAL.vision_end]
        plans.append(plan)
        row = 588 if kind == "image" else 1176
        patches.append(torch.randint(0, 256, (plan.num_patches, row), dtype=torch.uint8, generator=generator))
    input_ids = torch.tensor(ids)
    labels = torch.where(input_ids < WORDS, input_ids, -100)
    labels[: 1 + int(len(ids) * (1 - supervised))] = -100
    return Encoded(key, 0, input_ids, labels, tuple(plans), tuple(patches))


def pack(documents: Sequence[Encoded], number: int = 0) -> PackedBatch:
    return collate(number, documents, SPECIAL, max_tokens=1 << 20)


def random_parts(generator: torch.Generator, max_media: int = 3) -> list[Part]:
    """Words, then up to `max_media` images and clips of odd sizes with words between them."""

    def below(limit: int) -> int:
        return int(torch.randint(0, limit, (1,), generator=generator))

    parts: list[Part] = [1 + below(6)]
    for _ in range(below(max_media + 1)):
        rows, columns = 2 * (1 + below(4)), 2 * (1 + below(4))
        if below(2):
            parts.append(("image", (1, rows, columns)))
        else:
            parts.append(("video", (1 + below(4), rows, columns)))
        parts.append(1 + below(6))
    return parts


def all_logits(model: Qwen2VL, batch: PackedBatch) -> Tensor:
    """Logits [T, V] at every position."""
    return model(LogitsRequest(batch, torch.arange(batch.num_tokens)))


def reference_model(model: Qwen2VL) -> Qwen2VLForConditionalGeneration:
    """The transformers model with copies of `model`'s weights, float32, eager attention."""
    config = Qwen2VLConfig(**model.config.to_hf("float32"))
    config._attn_implementation = "eager"
    reference = Qwen2VLForConditionalGeneration(config).float()
    missing, unexpected = reference.load_state_dict(
        {reference_name(name): value for name, value in model.state_dict().items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    reference.tie_weights()
    return reference


def reference_name(name: str) -> str:
    """Our (published) parameter name in the nesting of transformers 5.x."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def reference_inputs(batch: PackedBatch, positions: bool = True) -> dict[str, Tensor]:
    """One document as transformers takes it: float pixels, every still image as two identical frames.

    With `positions` it gets our position ids, the paper's; without, it computes its own.
    """
    inputs = {"input_ids": batch.input_ids[None], "attention_mask": torch.ones_like(batch.input_ids)[None]}
    if positions:
        inputs["position_ids"] = batch.position_ids[:, None]
    else:
        kinds = torch.zeros_like(batch.input_ids)
        kinds[batch.input_ids == SPECIAL.image_pad] = 1
        kinds[batch.input_ids == SPECIAL.video_pad] = 2
        inputs["mm_token_type_ids"] = kinds[None]
    if batch.dummy_vision:
        return inputs
    grids = batch.grid_thw.long()
    is_image = grids.prod(1).cumsum(0) <= batch.image_patches.shape[0]
    if is_image.any():
        frames = batch.image_patches.view(-1, 3, 1, 196).expand(-1, 3, 2, 196).reshape(-1, 1176)
        inputs |= {"pixel_values": normalise(frames), "image_grid_thw": grids[is_image]}
    if (~is_image).any():
        inputs |= {"pixel_values_videos": normalise(batch.video_patches), "video_grid_thw": grids[~is_image]}
    return inputs
