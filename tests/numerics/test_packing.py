"""A pack of documents gives what the documents give alone: forward and gradients, whatever the neighbours and order."""

import random

import pytest
import torch
from torch import Tensor

from qwen2vl_train.model.attention import make_segments
from qwen2vl_train.model.parts import PARTS, part_of
from qwen2vl_train.model.qwen2vl import LogitsRequest, Qwen2VL
from qwen2vl_train.model.vision import Patches
from tests.model.builders import document, pack, random_parts, tiny_model


def random_documents(count: int, seed: int, max_media: int = 3):
    generator = torch.Generator().manual_seed(seed)
    return [document(random_parts(generator, max_media), seed=100 * seed + n, key=str(n)) for n in range(count)]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def gradients(model: Qwen2VL, batches) -> dict[str, Tensor]:
    """Summed gradients by part, flattened in float32."""
    model.zero_grad()
    for batch in batches:
        model(batch).loss_sum.backward()
    return {
        part: torch.cat([p.grad.float().flatten() for name, p in model.named_parameters() if part_of(name) == part])
        for part in PARTS
    }


@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_alone_forward_and_backward(seed):
    model = tiny_model()
    documents = random_documents(6, seed)
    packed, alone = pack(documents), [pack([item]) for item in documents]
    losses = model(packed).token_losses
    assert relative(losses, torch.cat([model(batch).token_losses for batch in alone])) < 1e-5
    packed_gradients, alone_gradients = gradients(model, [packed]), gradients(model, alone)
    for part in PARTS:
        assert relative(packed_gradients[part], alone_gradients[part]) < 1e-5


def logits(model, batch):
    """After every token."""
    return model(LogitsRequest(batch, torch.arange(batch.num_tokens))).detach()


@pytest.mark.parametrize("seed", range(12))
def test_a_documents_result_does_not_depend_on_neighbours_order_or_place(seed):
    model = tiny_model(seed=seed)
    probe = random_documents(1, 50 + seed)[0]
    alone = logits(model, pack([probe]))
    neighbours = random_documents(random.Random(seed).randint(1, 7), seed)
    for place in (0, len(neighbours) // 2, len(neighbours)):
        random.Random(seed + place).shuffle(neighbours)
        batch = pack([*neighbours[:place], probe, *neighbours[place:]])
        start = int(batch.cu_seqlens[place])
        assert relative(logits(model, batch)[start : start + len(alone)], alone) < 1e-5


def test_vision_segments_do_not_see_each_other():
    model = tiny_model()
    batch = pack([document([("image", (1, 4, 6)), 1, ("image", (1, 2, 8)), 1])])

    def features(image: Tensor) -> Tensor:
        segments = make_segments(batch.vision_cu_seqlens, batch.vision_max_seqlen, "reference")
        return model.visual(Patches(image, batch.video_patches, batch.patch_positions, segments))

    together = features(batch.image_patches)
    changed = batch.image_patches.clone()
    changed[24:] = 255 - changed[24:]  # the second image
    assert torch.equal(features(changed)[:6], together[:6])
    assert not torch.allclose(features(changed)[6:], together[6:])


def test_a_clips_steps_do_not_see_each_other_in_the_vision_transformer():
    model = tiny_model()
    batch = pack([document([("video", (3, 4, 4)), 1])])
    assert batch.vision_cu_seqlens.tolist() == [0, 16, 32, 48]
    segments = make_segments(batch.vision_cu_seqlens, 16, "reference")
    whole = model.visual(Patches(batch.image_patches, batch.video_patches, batch.patch_positions, segments))
    one = make_segments(torch.tensor([0, 16], dtype=torch.int32), 16, "reference")
    middle = model.visual(Patches(batch.image_patches, batch.video_patches[16:32], batch.patch_positions[16:32], one))
    assert relative(middle.detach(), whole[4:8].detach()) < 1e-6


def test_in_bf16_packing_moves_results_less_than_rounding_does():
    # The bound is bf16's own: alone in bf16 against alone in float32. Packing only changes how products are blocked.
    documents = random_documents(6, 3)
    packed, alone = pack(documents), [pack([item]) for item in documents]
    exact = gradients(tiny_model(), alone)
    half = tiny_model().bfloat16()
    rounded, together = gradients(half, alone), gradients(half, [packed])
    for part in PARTS:
        assert relative(together[part], rounded[part]) < relative(rounded[part], exact[part])
    losses = half(packed).token_losses
    assert relative(losses, torch.cat([half(batch).token_losses for batch in alone])) < 2.0**-7


def test_checkpointing_changes_no_gradient():
    batch = pack(random_documents(3, 1))
    plain = gradients(tiny_model(), [batch])
    for every in (1, 2):
        again = gradients(tiny_model(vision_checkpointing=every, text_checkpointing=every), [batch])
        assert all(torch.equal(again[part], plain[part]) for part in PARTS)
