"""One pack for several ranks (sequence parallelism): each gets a slice of its tokens and some of its frames.

Enters: a `PackedBatch` and the number of ranks N that share it. Leaves: N `PackSlice`s, the sum of which is the pack.
Tokens are cut into N stretches of equal length, wherever that falls in a document: attention is computed over the whole
pack, by heads. The vision transformer attends inside one temporal step, so its patches are cut between steps; a rank
without any gets the dummy image. Features then travel from the rank of their frame to the rank of their token. Costs
one copy of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from data_pipelines.pack.collate import MERGED_PATCHES
from data_pipelines.samples import PackedBatch


@dataclass(slots=True, kw_only=True)
class PackSlice(PackedBatch):
    """What rank `rank` of those that share a pack computes on.

    Its own: tokens, labels and positions of its stretch (`loss_index` and `vision_index` count from its first token);
    patches, their positions, `vision_cu_seqlens` and `vision_max_seqlen` of its frames. The whole pack's: all others.

    slice_tokens       tokens with each rank, T_0 to T_(N-1); documents in `cu_seqlens` cover all of them
    feature_order      int64 [F]: the features of this rank's frames, ordered by the rank that they go to
    features_sent      how many of them go to each rank; features_received how many come from each, for `vision_index`
    """

    rank: int
    slice_tokens: tuple[int, ...]
    feature_order: Tensor
    features_sent: tuple[int, ...]
    features_received: tuple[int, ...]


def slice_pack(batch: PackedBatch, ranks: int) -> list[PackSlice]:
    """The slices of `batch` (in host memory) for `ranks` ranks, in rank order.

    A pack of 7 tokens for 2 ranks: tokens 0 to 2 and 3 to 6.
    """
    borders = [batch.num_tokens * rank // ranks for rank in range(ranks + 1)]
    steps = _step_borders(batch.vision_cu_seqlens, ranks)
    # Of each feature in the ViT's order: the rank of its frame and, if it is no dummy's, of the token it replaces.
    patches = batch.vision_cu_seqlens[steps]
    count = batch.vision_index.shape[0]
    source = torch.bucketize(torch.arange(count) * MERGED_PATCHES, patches[1:], right=True)
    target = torch.bucketize(batch.vision_index, torch.tensor(borders[1:]), right=True)
    # travels[s, t]: features that go from rank s to rank t
    travels = torch.bincount(source * ranks + target, minlength=ranks * ranks).view(ranks, ranks)
    return [
        _slice(
            batch, rank, borders, steps.tolist(), target[source == rank], batch.vision_index[target == rank], travels
        )
        for rank in range(ranks)
    ]


def _step_borders(cu_seqlens: Tensor, ranks: int) -> Tensor:
    """Numbers of the temporal steps between which the patches are cut, int64 [ranks + 1]: nearest to equal parts."""
    wanted = torch.arange(ranks + 1) * int(cu_seqlens[-1]) / ranks
    return (cu_seqlens[None, :] - wanted[:, None]).abs().argmin(dim=1)


def _slice(
    batch: PackedBatch,
    rank: int,
    borders: list[int],
    steps: list[int],
    targets: Tensor,
    vision_index: Tensor,
    travels: Tensor,
) -> PackSlice:
    first, end = borders[rank], borders[rank + 1]
    labelled = (batch.loss_index >= first) & (batch.loss_index < end)
    own = {field.name: getattr(batch, field.name) for field in fields(PackedBatch)}
    own |= {
        "input_ids": batch.input_ids[first:end].clone(),
        "labels": batch.labels[first:end].clone(),
        "position_ids": batch.position_ids[:, first:end].clone(),
        "vision_index": vision_index - first,
        "loss_index": batch.loss_index[labelled] - first,
        "loss_targets": batch.loss_targets[labelled],
        "loss_datasets": batch.loss_datasets[labelled],
    }
    own |= _frames(batch, steps[rank], steps[rank + 1])
    return PackSlice(
        **own,
        rank=rank,
        slice_tokens=tuple(after - before for before, after in pairwise(borders)),
        feature_order=targets.argsort(stable=True),
        features_sent=tuple(travels[rank].tolist()),
        features_received=tuple(travels[:, rank].tolist()),
    )


def _frames(batch: PackedBatch, first_step: int, end_step: int) -> dict[str, Tensor | int]:
    """The vision fields of temporal steps `first_step` to `end_step`, or of the dummy image where there is none."""
    images = batch.image_patches.shape[0]
    if first_step == end_step:
        return {
            "image_patches": batch.image_patches.new_zeros(MERGED_PATCHES, batch.image_patches.shape[1]),
            "video_patches": batch.video_patches[:0].clone(),
            "patch_positions": batch.patch_positions[:MERGED_PATCHES].clone(),
            "vision_cu_seqlens": torch.tensor([0, MERGED_PATCHES], dtype=torch.int32),
            "vision_max_seqlen": MERGED_PATCHES,
        }
    cu_seqlens = batch.vision_cu_seqlens[first_step : end_step + 1]
    first, end = int(cu_seqlens[0]), int(cu_seqlens[-1])
    return {
        "image_patches": batch.image_patches[first:end].clone(),
        "video_patches": batch.video_patches[max(0, first - images) : max(0, end - images)].clone(),
        "patch_positions": batch.patch_positions[first:end].clone(),
        "vision_cu_seqlens": cu_seqlens - first,
        "vision_max_seqlen": int(cu_seqlens.diff().max()),
    }
