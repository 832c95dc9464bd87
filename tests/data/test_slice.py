"""One pack cut for several ranks: tokens anywhere, frames between temporal steps, nothing lost or doubled."""

from dataclasses import fields

import pytest
import torch

from data_pipelines.pack.collate import collate
from data_pipelines.pack.slice import PackSlice, slice_pack
from data_pipelines.samples import PackedBatch
from tests.distributed.packs import SPECIAL, document, uneven_packs


def mixed_pack() -> PackedBatch:
    """Document 1: token, start, 4 clip features of 2 steps, end, 3 words; document 2: token, start, 6, end, 3 words.

    Tokens 0 to 9 and 10 to 21. In the ViT's order the still comes first: 24 patches, then 2 steps of 8.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [document(generator, ("video",), 3, 2), document(generator, ("image",), 3, 1)]
    return collate(7, documents, SPECIAL, max_tokens=64)


def test_tokens_are_cut_into_equal_stretches_wherever_documents_end():
    slices = slice_pack(mixed_pack(), 3)
    assert [part.slice_tokens for part in slices] == [(7, 7, 8)] * 3
    assert [part.num_tokens for part in slices] == [7, 7, 8]
    # supervised: words 8 and 9 (predicted at 7 and 8), and 21 (at 20)
    assert [part.loss_index.tolist() for part in slices] == [[], [0, 1], [6]]
    assert [part.cu_seqlens.tolist() for part in slices] == [[0, 10, 22]] * 3


def test_frames_are_cut_between_temporal_steps_and_features_sent_to_their_tokens():
    # 40 patches for 2 ranks: the border nearest to 20 is 24, where the still ends; 11 tokens each
    still, clip = slice_pack(mixed_pack(), 2)
    assert (still.image_patches.shape[0], still.video_patches.shape[0]) == (24, 0)
    assert (clip.image_patches.shape[0], clip.video_patches.shape[0]) == (0, 16)
    assert still.vision_cu_seqlens.tolist() == [0, 24]
    assert (clip.vision_cu_seqlens.tolist(), clip.vision_max_seqlen) == ([0, 8, 16], 8)
    # the still's tokens are 12 to 17, the clip's 2 to 5: each rank sees what the other needs
    assert (still.features_sent, still.features_received) == ((0, 6), (0, 4))
    assert (clip.features_sent, clip.features_received) == ((4, 0), (6, 0))
    assert still.vision_index.tolist() == [2, 3, 4, 5]
    assert clip.vision_index.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_rank_without_frames_gets_the_dummy_image_and_sends_nothing():
    first, second, third, fourth = slice_pack(mixed_pack(), 4)  # three steps for four ranks
    idle = [part for part in (first, second, third, fourth) if sum(part.features_sent) == 0]
    assert [part.rank for part in idle] == [0], "borders 0, 24, 32, 40; the nearest to 10 is 0"
    assert idle[0].image_patches.tolist() == torch.zeros(4, 588).tolist()
    assert idle[0].vision_cu_seqlens.tolist() == [0, 4]
    assert not idle[0].dummy_vision, "the pack has media: all ranks exchange features"


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("number", range(6))
def test_slices_together_are_the_pack(number, ranks):
    pack = [*uneven_packs(4), mixed_pack(), collate(9, [], SPECIAL, max_tokens=64)][number]
    slices = slice_pack(pack, ranks)
    for name in ("input_ids", "labels", "position_ids"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in slices], -1), getattr(pack, name))
    for name in ("loss_targets", "loss_datasets"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in slices]), getattr(pack, name))
    starts = torch.tensor([0, *slices[0].slice_tokens]).cumsum(0)
    loss_index = torch.cat([part.loss_index + start for part, start in zip(slices, starts[:-1], strict=True)])
    torch.testing.assert_close(loss_index, pack.loss_index)
    if not pack.dummy_vision:
        seeing = [part for part in slices if part.feature_order.numel()]
        for name in ("image_patches", "video_patches", "patch_positions"):
            torch.testing.assert_close(torch.cat([getattr(part, name) for part in seeing]), getattr(pack, name))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_features_arrive_at_the_tokens_that_they_replace(ranks):
    pack = mixed_pack()
    slices = slice_pack(pack, ranks)
    seen = iter(range(len(pack.vision_index)))  # feature f of the pack, as its rank sees it
    outgoing = []
    for part in slices:
        own = torch.tensor([next(seen) for _ in part.feature_order], dtype=torch.int64)
        outgoing.append(own[part.feature_order].split(part.features_sent))
    starts = torch.tensor([0, *slices[0].slice_tokens]).cumsum(0).tolist()
    for part in slices:
        arrived = torch.cat([sent[part.rank] for sent in outgoing])
        assert tuple(len(sent[part.rank]) for sent in outgoing) == part.features_received
        assert (part.vision_index + starts[part.rank]).tolist() == pack.vision_index[arrived].tolist()


def test_a_slice_moves_with_all_its_tensors():
    part = slice_pack(mixed_pack(), 2)[0].to(torch.device("meta"))
    assert type(part) is PackSlice
    tensors = [getattr(part, field.name) for field in fields(part)]
    assert all(tensor.is_meta for tensor in tensors if isinstance(tensor, torch.Tensor))
