"""Patches into features: normalisation, still images, and what no pack may upset."""

import numpy as np
import torch

from qwen2vl_train.model.attention import make_segments
from qwen2vl_train.model.qwen2vl import LogitsRequest
from qwen2vl_train.model.vision import PatchProjection, normalise
from tests.model.builders import document, pack, tiny_model


def test_normalisation_is_clips_per_channel():
    values = torch.arange(0, 256, dtype=torch.uint8)[:196].repeat(3).view(1, 588)
    found = normalise(values).view(3, 196)
    for channel, (mean, std) in enumerate(
        zip((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True)
    ):
        wanted = (np.arange(196) / 255 - mean) / std
        assert np.allclose(found[channel].numpy(), wanted, atol=1e-6)
    assert found.dtype == torch.float32


def projection() -> PatchProjection:
    module = PatchProjection(24)
    torch.nn.init.normal_(module.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return module


def test_a_still_image_equals_two_identical_frames():
    module = projection()
    still = torch.randint(0, 256, (5, 588), dtype=torch.uint8)
    twice = still.view(5, 3, 1, 196).expand(-1, -1, 2, -1).reshape(5, 1176)
    none = torch.zeros(0, 588, dtype=torch.uint8)
    once = module(still, torch.zeros(0, 1176, dtype=torch.uint8))
    doubled = module(none, twice)
    assert torch.allclose(once, doubled, rtol=1e-5, atol=1e-5)
    (first,), (second,) = (torch.autograd.grad(x.square().sum(), module.weight) for x in (once, doubled))
    assert (first - second).norm() / second.norm() < 1e-5


def test_the_projection_is_the_published_convolution():
    module = projection()
    clip = torch.randint(0, 256, (4, 1176), dtype=torch.uint8)
    convolution = torch.nn.functional.conv3d(normalise(clip).view(4, 3, 2, 14, 14), module.weight, stride=(2, 14, 14))
    found = module(torch.zeros(0, 588, dtype=torch.uint8), clip)
    assert torch.allclose(found, convolution.view(4, 24), rtol=1e-4, atol=1e-4)


def test_still_images_come_before_clips_and_features_reach_their_own_rows():
    model = tiny_model()
    clip_first = pack([document([1, ("video", (1, 2, 2)), 1, ("image", (1, 2, 2)), 2])])
    # rows: word, start, clip's token 2, end, word, start, image's token 6, end, words
    assert clip_first.vision_index.tolist() == [6, 2]
    changed = pack([document([1, ("video", (1, 2, 2)), 1, ("image", (1, 2, 2)), 2])])
    changed.image_patches = 255 - changed.image_patches
    before, after = (model(LogitsRequest(batch, torch.arange(10))).detach() for batch in (clip_first, changed))
    assert torch.equal(before[:6], after[:6])  # what comes before the image does not see it
    assert not torch.allclose(before[6:], after[6:])


def test_the_forward_pass_reads_no_tensor_on_the_host_but_the_borders(monkeypatch):
    # On CUDA each of these makes the host wait for the device. The reference backend may read document borders only.
    model = tiny_model()
    batch = pack([document([3, ("image", (1, 4, 4)), 5])])
    segments = make_segments(batch.cu_seqlens, batch.max_seqlen, "varlen")
    assert segments.runs is None
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            reads.append((_name, tuple(self.shape)))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    model(batch).loss_sum.backward()
    assert reads == [("tolist", (1,)), ("tolist", (1,))]  # vision segments, documents
