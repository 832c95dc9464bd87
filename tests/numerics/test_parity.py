"""The model against transformers: logits, loss and gradients in float32, on random models of several shapes."""

import pytest
import torch
from torch.nn import functional as F

from qwen2vl_train.model.parts import PARTS, part_of
from tests.model.builders import (
    SPECIAL,
    all_logits,
    document,
    model_config,
    pack,
    reference_inputs,
    reference_model,
    reference_name,
    tiny_model,
)

MODELS = {
    "tied, grouped heads": model_config(),
    "untied, grouped heads": model_config(tied=False),
    "one key head": model_config(kv_heads=1, heads=4),
    "no grouping, deep": model_config(kv_heads=4, layers=5, depth=4),
    "wide heads": model_config(hidden=96, heads=2, kv_heads=1, section=(8, 8, 8), width=48, vision_heads=4),
}
DOCUMENTS = {
    "text alone": [17],
    "one image": [3, ("image", (1, 4, 6)), 9],
    "five images": [2, *[part for n in range(5) for part in (("image", (1, 2 + 2 * n, 10 - 2 * n)), 2)]],
    "clip": [1, ("video", (3, 4, 2)), 6],
    "images and clips": [("image", (1, 2, 2)), ("video", (2, 6, 4)), 4, ("image", (1, 8, 2)), ("video", (1, 2, 2)), 5],
    "long clip": [2, ("video", (6, 2, 4)), 5],
}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("parts", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_logits_and_gradients_equal_transformers(config, parts):
    model = tiny_model(config)
    reference = reference_model(model)
    batch = pack([document(parts)])

    logits = reference(**reference_inputs(batch)).logits[0]
    assert relative(all_logits(model, batch), logits) < 1e-5

    loss = F.cross_entropy(logits[batch.loss_index], batch.loss_targets, reduction="sum")
    output = model(batch)
    assert output.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    output.loss_sum.backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for part in PARTS:
        names = [name for name, _ in model.named_parameters() if part_of(name) == part]
        ours = torch.cat([model.get_parameter(name).grad.flatten() for name in names])
        if theirs[reference_name(names[0])] is None:
            # text alone: transformers does not run its ViT, ours runs a dummy image that contributes exactly nothing
            assert batch.dummy_vision
            assert ours.abs().max() == 0
            continue
        wanted = torch.cat([theirs[reference_name(name)].flatten() for name in names])
        assert F.cosine_similarity(ours, wanted, dim=0) > 0.99999
        assert float(ours.norm()) == pytest.approx(float(wanted.norm()), rel=1e-4)


def test_positions_after_a_long_clip_follow_the_paper_where_transformers_5_does_not():
    # grid (6, 2, 4): 6 steps of 1 x 2 tokens. [x, start, 12 tokens, end, x, x]: the clip is at t = 2..7, so the paper's
    # rule (largest position + 1) puts <end> at 8. transformers 5.x advances by max(H, W) / 2 = 2 only, to 4.
    batch = pack([document([1, ("video", (6, 2, 4)), 2])])
    assert batch.position_ids[0].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10]
    inputs = reference_inputs(batch, positions=False)
    theirs, _ = reference_model(tiny_model()).model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    assert theirs[0, 0, -3:].tolist() == [4, 5, 6]
    assert batch.input_ids[-3] == SPECIAL.vision_end
    assert batch.position_ids[:, -3].tolist() == [8, 8, 8]


def test_positions_of_images_and_short_clips_agree_with_transformers():
    batch = pack([document(DOCUMENTS["five images"])])
    inputs = reference_inputs(batch, positions=False)
    reference = reference_model(tiny_model())
    theirs, _ = reference.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    assert torch.equal(theirs[:, 0], batch.position_ids)
