"""Freezing by part: what trains, what is kept, and that a wrong rule stops the run."""

import pytest
import torch
from torch import nn

from benchmarks.peak import measure_peak
from qwen2vl_train.model.parts import PARTS, audit, format_audit, freeze, part_of, vit_layer
from tests.model.builders import document, model_config, pack, tiny_model

STAGES = {
    "vision": {"vit", "merger"},
    "multitask": {"vit", "merger", "llm"},
    "instruct": {"llm"},
    "vit alone": {"vit"},
    "merger alone": {"merger"},
}
WITH_IMAGE = [document([3, ("image", (1, 4, 4)), 5])]
TEXT_ALONE = [document([9])]


@pytest.mark.parametrize("trainable", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("documents", [WITH_IMAGE, TEXT_ALONE], ids=["image", "text"])
def test_only_the_named_parts_get_gradients(trainable, documents):
    model = tiny_model(model_config(tied=False))
    freeze(model, trainable)
    model(pack(documents)).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (part_of(name) in trainable), name


def test_a_frozen_decoder_passes_the_same_gradients_to_the_vision_transformer():
    whole, frozen = tiny_model(), tiny_model()
    freeze(frozen, {"vit", "merger"})
    for model in (whole, frozen):
        model(pack(WITH_IMAGE)).loss_sum.backward()
    for name, parameter in frozen.visual.named_parameters():
        assert torch.allclose(parameter.grad, whole.visual.get_parameter(name).grad, rtol=1e-5, atol=1e-7), name


def test_a_frozen_vision_transformer_keeps_no_activations():
    batch = pack([document([1, ("image", (1, 16, 16)), 2])])

    def held(trainable: set[str]) -> int:
        model = tiny_model(model_config(depth=6, layers=1))
        freeze(model, trainable)
        outputs = []
        return measure_peak(lambda: outputs.append(model(batch))).held_bytes

    # 6 blocks keep about 19 x 32 numbers for each of the 256 patches: 3.7 MB, of a decoder of one layer 0.6 MB
    activations = 6 * 16 * 32 * 256 * 4
    assert held({"vit", "merger", "llm"}) - held({"merger", "llm"}) > activations


@pytest.mark.parametrize("trainable", [{"vit", "merger"}, {"vit", "merger", "llm"}, {"llm"}])
def test_a_dummy_image_contributes_exactly_nothing(trainable):
    model = tiny_model()
    freeze(model, trainable)
    batch = pack(TEXT_ALONE)
    assert batch.dummy_vision
    output = model(batch)
    output.loss_sum.backward()
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.mul_(3.0)
    assert model(batch).loss_sum.item() == output.loss_sum.item()
    for parameter in model.visual.parameters():
        assert parameter.grad is None or parameter.grad.abs().max() == 0


def test_the_audit_counts_every_parameter_once():
    model = tiny_model()
    freeze(model, {"merger"})
    rows = audit(model, {"merger"})
    assert [row.part for row in rows] == list(PARTS)
    vit, merger, llm = rows
    # width 32, merged 128: norm 64, 128 x 128 + 128, 128 x 64 + 64
    assert (merger.trainable_parameters, merger.frozen_parameters) == (64 + 16_512 + 8_256, 0)
    assert vit.trainable_parameters == llm.trainable_parameters == 0
    total = sum(row.trainable_parameters + row.frozen_parameters for row in rows)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert "24,832" in format_audit(rows)


def test_the_audit_stops_at_a_parameter_that_trains_against_the_rule():
    model = tiny_model()
    freeze(model, {"llm"})
    model.visual.blocks[1].norm1.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"visual\.blocks\.1\.norm1\.bias trains, but part vit is to be frozen"):
        audit(model, {"llm"})
    model.visual.blocks[1].norm1.bias.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is frozen, but part llm is to be trained"):
        audit(model, {"llm"})


def test_a_parameter_without_a_part_stops_the_run():
    model = tiny_model()
    model.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"adapter\.weight belongs to no part"):
        freeze(model, {"llm"})
    with pytest.raises(ValueError, match=r"adapter\.weight belongs to no part"):
        audit(model, {"llm"})


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="unknown part vision"):
        freeze(tiny_model(), {"vision"})


def test_vit_layers_count_from_the_patch_embedding():
    assert vit_layer("visual.patch_embed.proj.weight") == 0
    assert vit_layer("visual.blocks.0.attn.qkv.weight") == 1
    assert vit_layer("visual.blocks.31.mlp.fc2.bias") == 32
    with pytest.raises(ValueError, match="in no layer"):
        vit_layer("visual.merger.ln_q.weight")
