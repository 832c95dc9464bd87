"""A pack laid out by hand."""

from types import SimpleNamespace

import pytest
import torch

from data_pipelines.errors import PlanMismatch
from data_pipelines.pack.collate import collate, patch_positions
from data_pipelines.samples import Encoded, LedgerEvent, MediaPlan

SPECIAL = SimpleNamespace(endoftext=0, image_pad=8, video_pad=9)
NONE = -100


def document(key, dataset, ids, labels, *grids):
    plans = tuple(MediaPlan("image", g, 1) if g[0] == 1 else MediaPlan("video", g, 2 * g[0]) for g in grids)
    patches = tuple(
        torch.full((plan.num_patches, 588 if plan.kind == "image" else 1176), number + 1, dtype=torch.uint8)
        for number, plan in enumerate(plans)
    )
    return Encoded(key, dataset, torch.tensor(ids), torch.tensor(labels), plans, patches)


@pytest.fixture
def pack():
    clip_first = document("a", 3, [5, 9, 9, 6, 8, 7], [NONE, NONE, NONE, 6, NONE, 7], (2, 2, 2), (1, 2, 2))
    image = document("b", 1, [4, 8, 8, 7, 7], [NONE, NONE, NONE, 7, 7], (1, 2, 4))
    return collate(12, [clip_first, image], SPECIAL, 16, [LedgerEvent("d", "c", "r", "m")])


def test_documents_stand_end_to_end(pack):
    assert pack.input_ids.tolist() == [5, 9, 9, 6, 8, 7, 4, 8, 8, 7, 7]
    assert pack.cu_seqlens.tolist() == [0, 6, 11]
    assert (pack.max_seqlen, pack.number, pack.keys, pack.datasets) == (6, 12, ("a", "b"), (3, 1))
    assert pack.cu_seqlens.dtype == torch.int32
    assert [event.key for event in pack.events] == ["c"]


def test_each_row_predicts_the_next_supervised_token_of_its_document(pack):
    assert pack.loss_index.tolist() == [2, 4, 8, 9]
    assert pack.loss_targets.tolist() == [6, 7, 7, 7]
    assert pack.loss_datasets.tolist() == [3, 3, 1, 1]
    assert pack.num_supervised == 4


def test_the_vit_sees_still_images_first_and_features_find_their_rows(pack):
    assert pack.grid_thw.tolist() == [[1, 2, 2], [1, 2, 4], [2, 2, 2]]
    assert pack.vision_cu_seqlens.tolist() == [0, 4, 12, 16, 20]
    assert pack.vision_max_seqlen == 8
    # image of document a stands at row 4, the image of document b at 7 and 8, the clip at 1 and 2
    assert pack.vision_index.tolist() == [4, 7, 8, 1, 2]
    assert pack.image_patches.shape == (12, 588)
    assert pack.image_patches[:, 0].tolist() == [2] * 4 + [1] * 8
    assert pack.video_patches.shape == (8, 1176)
    assert not pack.dummy_vision


def test_positions_restart_at_each_document(pack):
    # a: text 0, clip of 2 steps at 1 and 2, text 3, image 4, text 5; b: text 0, image of 1 x 2 tokens at 1, text 3, 4
    assert pack.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 1, 3, 4]
    assert pack.position_ids[2].tolist() == [0, 1, 1, 3, 4, 5, 0, 1, 2, 3, 4]


def test_patch_positions_walk_merged_blocks():
    assert patch_positions((1, 2, 4)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert torch.equal(patch_positions((2, 4, 2)), torch.cat([patch_positions((1, 4, 2))] * 2))


def test_a_pack_without_media_carries_a_dummy_image():
    pack = collate(0, [document("a", 0, [5, 6], [NONE, 6])], SPECIAL, 16)
    assert pack.dummy_vision
    assert pack.image_patches.shape == (4, 588)
    assert pack.grid_thw.tolist() == [[1, 2, 2]]
    assert pack.vision_cu_seqlens.tolist() == [0, 4]
    assert pack.vision_index.numel() == 0


def test_an_empty_pack_is_one_unsupervised_token():
    pack = collate(7, [], SPECIAL, 16)
    assert pack.input_ids.tolist() == [0]
    assert pack.cu_seqlens.tolist() == [0, 1]
    assert (pack.num_supervised, pack.dummy_vision, pack.keys) == (0, True, ())
    assert pack.position_ids.tolist() == [[0], [0], [0]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (document("k", 0, [5, 6], [5, 6]), "first token of k is supervised"),
        (document("k", 0, [5] * 17, [NONE] * 17), "17 tokens, max_tokens 16"),
        (document("k", 0, [5, 8], [NONE, NONE], (1, 4, 2)), "pad tokens"),
    ],
)
def test_a_broken_document_is_a_defect(bad, message):
    with pytest.raises((PlanMismatch, ValueError), match=message):
        collate(0, [bad], SPECIAL, 16)
