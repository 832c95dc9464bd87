"""Documents → one packed sequence: `Encoded` samples laid end to end, with everything the model needs beside them.

Enters: the encoded documents of a pack, in plan order. Leaves: a `PackedBatch` without padding or batch dimension.
Costs one copy of the patches. Drops nothing: what failed earlier arrives as `events`, and an empty pack is legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipelines.errors import PlanMismatch
from data_pipelines.pack.mrope import position_ids
from data_pipelines.samples import (
    IGNORE_INDEX,
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    Encoded,
    LedgerEvent,
    PackedBatch,
)

if TYPE_CHECKING:
    from data_pipelines.tokenizer import SpecialTokens

IMAGE_ROW = 3 * PATCH_SIZE * PATCH_SIZE
VIDEO_ROW = IMAGE_ROW * TEMPORAL_PATCH_SIZE
MERGED_PATCHES = MERGE_SIZE * MERGE_SIZE


def collate(
    number: int,
    documents: Sequence[Encoded],
    special: SpecialTokens,
    max_tokens: int,
    events: Sequence[LedgerEvent] = (),
    one_dimensional: bool = False,
) -> PackedBatch:
    """Pack number `number` from its documents (at most `max_tokens` tokens together).

    `one_dimensional` as in `position_ids`.

    Raises:
        PlanMismatch: more than `max_tokens` tokens, a supervised first token of a document (it would be predicted from
            the document before), or patches that do not match their plan: the encoder broke its contract.
    """
    _check(number, documents, max_tokens)
    lengths = [int(document.input_ids.shape[0]) for document in documents]
    if documents:
        input_ids = torch.cat([document.input_ids for document in documents])
        labels = torch.cat([document.labels for document in documents])
    else:
        lengths = [1]
        input_ids = torch.tensor([special.endoftext], dtype=torch.int64)
        labels = torch.tensor([IGNORE_INDEX], dtype=torch.int64)
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    grids = [plan.grid_thw for document in documents for plan in document.media]
    positions = position_ids(input_ids, grids, special.image_pad, special.video_pad, cu_seqlens, one_dimensional)
    # Row i predicts token i + 1. A document's first label is never supervised, so no row predicts across a border.
    loss_index = torch.nonzero(labels[1:] != IGNORE_INDEX).flatten()
    dataset_of_token = np.repeat([document.dataset for document in documents] or [0], lengths)
    vision = _vision(documents)
    return PackedBatch(
        number=number,
        input_ids=input_ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        image_patches=vision["image_patches"],
        video_patches=vision["video_patches"],
        grid_thw=vision["grid_thw"],
        vision_cu_seqlens=vision["cu_seqlens"],
        vision_max_seqlen=int(vision["cu_seqlens"].diff().max()),
        patch_positions=vision["patch_positions"],
        vision_index=_vision_index(documents, input_ids, special),
        loss_index=loss_index,
        loss_targets=labels[loss_index + 1],
        loss_datasets=torch.from_numpy(dataset_of_token.astype(np.int64))[loss_index + 1],
        dummy_vision=not grids,
        max_tokens=max_tokens,
        keys=tuple(document.key for document in documents),
        datasets=tuple(document.dataset for document in documents),
        events=tuple(events),
    )


def patch_positions(grid_thw: tuple[int, int, int]) -> Tensor:
    """(row, column) of each patch in the ViT's order (t, h/2, w/2, 2, 2): int32 [t * h * w, 2].

    Grid (1, 2, 4): (0,0) (0,1) (1,0) (1,1) (0,2) (0,3) (1,2) (1,3), one 2 x 2 block after the other.
    """
    t, h, w = grid_thw
    rows = torch.arange(h, dtype=torch.int32).view(h, 1).expand(h, w)
    columns = torch.arange(w, dtype=torch.int32).view(1, w).expand(h, w)
    blocks = torch.stack((rows, columns), dim=-1).view(h // MERGE_SIZE, MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, 2)
    return blocks.transpose(1, 2).reshape(1, h * w, 2).expand(t, -1, -1).reshape(t * h * w, 2)


def _check(number: int, documents: Sequence[Encoded], max_tokens: int) -> None:
    total = sum(int(document.input_ids.shape[0]) for document in documents)
    if total > max_tokens:
        raise PlanMismatch(f"pack {number}: {total} tokens, max_tokens {max_tokens}: {[d.key for d in documents]}")
    for document in documents:
        if document.labels.numel() and int(document.labels[0]) != IGNORE_INDEX:
            raise PlanMismatch(f"pack {number}: the first token of {document.key} is supervised")
        for plan, patches in zip(document.media, document.patches, strict=True):
            expected = (plan.num_patches, IMAGE_ROW if plan.kind == "image" else VIDEO_ROW)
            if tuple(patches.shape) != expected:
                raise PlanMismatch(f"pack {number}: {document.key} has patches {tuple(patches.shape)}, plan {expected}")


def _vision(documents: Sequence[Encoded]) -> dict[str, Tensor]:
    """Patches, grids, segments and patch positions in the ViT's order: still images first, then clips."""
    items = [item for document in documents for item in zip(document.media, document.patches, strict=True)]
    images = [patches for plan, patches in items if plan.kind == "image"]
    videos = [patches for plan, patches in items if plan.kind == "video"]
    grids = [plan.grid_thw for kind in ("image", "video") for plan, _ in items if plan.kind == kind]
    if not grids:  # the dummy image: one merged token, so that a rank without media makes the same calls
        grids = [(1, MERGE_SIZE, MERGE_SIZE)]
        images = [torch.zeros(MERGED_PATCHES, IMAGE_ROW, dtype=torch.uint8)]
    segments = [h * w for t, h, w in grids for _ in range(t)]
    return {
        "image_patches": torch.cat(images) if images else torch.zeros(0, IMAGE_ROW, dtype=torch.uint8),
        "video_patches": torch.cat(videos) if videos else torch.zeros(0, VIDEO_ROW, dtype=torch.uint8),
        "grid_thw": torch.tensor(grids, dtype=torch.int32),
        "cu_seqlens": torch.tensor(np.cumsum([0, *segments]), dtype=torch.int32),
        "patch_positions": torch.cat([patch_positions(grid) for grid in grids]),
    }


def _vision_index(documents: Sequence[Encoded], input_ids: Tensor, special: SpecialTokens) -> Tensor:
    """The row of `input_ids` that each merged feature replaces, in the ViT's order: int64 [P / 4]."""
    images = torch.nonzero(input_ids == special.image_pad).flatten()
    videos = torch.nonzero(input_ids == special.video_pad).flatten()
    planned = {"image": 0, "video": 0}
    for document in documents:
        for plan in document.media:
            planned[plan.kind] += plan.num_tokens
    if planned != {"image": len(images), "video": len(videos)}:
        raise PlanMismatch(f"pad tokens {len(images)} image, {len(videos)} video; planned {planned}")
    return torch.cat((images, videos))
