"""Hand-made packs for tests of the trainer: random documents with still images, clips or text alone."""

from __future__ import annotations

import torch

from data_pipelines.pack.collate import collate
from data_pipelines.samples import Encoded, MediaPlan, PackedBatch
from data_pipelines.tokenizer import SpecialTokens
from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig

VOCABULARY = 200
SPECIAL = SpecialTokens(*range(VOCABULARY - 13, VOCABULARY))


def model_config(tied: bool = True) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(depth=2, embed_dim=32, num_heads=2),
        text=TextConfig(VOCABULARY, 32, 64, 2, 2, 1, mrope_section=(2, 3, 3)),
        tie_word_embeddings=tied,
        image_token_id=SPECIAL.image_pad,
        video_token_id=SPECIAL.video_pad,
        vision_start_token_id=SPECIAL.vision_start,
        vision_end_token_id=SPECIAL.vision_end,
    )


CONFIG = model_config()
PLANS = {"image": MediaPlan("image", (1, 4, 6), 1), "video": MediaPlan("video", (2, 4, 2), 4)}


def document(
    generator: torch.Generator, media: tuple[str, ...], words: int, supervised: int, dataset: int = 0
) -> Encoded:
    """Media, then `words` random words of which the last `supervised` are learnt."""
    ids: list[int] = [1]
    patches = []
    for kind in media:
        plan = PLANS[kind]
        pad = SPECIAL.image_pad if kind == "image" else SPECIAL.video_pad
        ids += [SPECIAL.vision_start, *[pad] * plan.num_tokens, SPECIAL.vision_end]
        row = 588 if kind == "image" else 1176
        patches.append(torch.randint(0, 256, (plan.num_patches, row), dtype=torch.uint8, generator=generator))
    ids += torch.randint(2, VOCABULARY - 13, (words,), generator=generator).tolist()
    input_ids = torch.tensor(ids)
    labels = torch.full_like(input_ids, -100)
    if supervised:
        labels[-supervised:] = input_ids[-supervised:]
    return Encoded("doc", dataset, input_ids, labels, tuple(PLANS[kind] for kind in media), tuple(patches))


def uneven_packs(count: int, seed: int = 0) -> list[PackedBatch]:
    """`count` packs whose kinds and label counts differ wildly: text alone (132 labels), stills, clips only (3), none.

    Dealt out to 2 ranks, rank 0 has the text and the clips; to 4, one has clips only and one never has a label.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = [
        [((), 130, 130), ((), 30, 2)],
        [(("image",), 6, 1), (("image", "video"), 12, 5)],
        [(("video",), 5, 3)],
        [(("image",), 7, 0)],
    ]
    packs = []
    for number in range(count):
        documents = [document(generator, *shape, dataset=number % 2) for shape in kinds[number % len(kinds)]]
        packs.append(collate(number, documents, SPECIAL, max_tokens=256))
    return packs
