"""Estimated bytes against measured allocations, and optimizer state by hand."""

import gc

import pytest

from benchmarks.peak import measure_peak
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import PackLengths
from qwen2vl_train.model.footprint import Running, activation_bytes, state_bytes
from qwen2vl_train.model.parts import freeze
from tests.model.builders import document, model_config, pack, tiny_model

PACKS = {
    "images, clip and text": [
        [40, ("image", (1, 16, 16)), 60, ("video", (3, 12, 8)), 30],
        [300, ("image", (1, 10, 14)), 200],
    ],
    "text": [[1500]],
    "one large image": [[5, ("image", (1, 32, 40)), 30]],
}
STAGES = [{"vit", "merger"}, {"vit", "merger", "llm"}, {"llm"}]


@pytest.mark.parametrize("parts", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("trainable", STAGES, ids=lambda stage: "+".join(sorted(stage)))
@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [(model_config(depth=4, layers=4, width=64), 0), (model_config(hidden=128, width=128, section=(4, 6, 6)), 2),
     (model_config(depth=4, layers=4, tied=False), 1)],
    ids=["all kept", "every second recomputed", "all recomputed"],
)  # fmt: skip
def test_estimated_peak_is_within_a_tenth_of_the_measured(parts, trainable, config, checkpointing):
    model = tiny_model(config, vision_checkpointing=checkpointing, text_checkpointing=checkpointing)
    freeze(model, trainable)
    batch = pack([document(part, seed, supervised=0.3) for seed, part in enumerate(parts)])
    model(batch).loss_sum.backward()  # the first run fills caches that stay
    model.zero_grad()
    gc.collect()
    outputs = []
    held = measure_peak(lambda: outputs.append(model(batch))).held_bytes
    outputs.clear()
    gc.collect()
    peak = measure_peak(lambda: model(batch).loss_sum.backward()).peak_bytes
    estimate = activation_bytes(
        config, PackLengths.of(batch), trainable, Running(4, checkpointing, checkpointing, False)
    )
    # after forward the loss holds its gradients too: of the selected hidden states, and of the output matrix
    held -= 4 * batch.num_supervised * config.text.hidden_size
    held -= 4 * config.text.vocab_size * config.text.hidden_size * ("llm" in trainable)
    assert estimate.held == pytest.approx(held, rel=0.1)
    assert estimate.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("trainable", STAGES, ids=lambda stage: "+".join(sorted(stage)))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_an_engine_that_takes_gradients_away_at_once_needs_the_partitioned_peak(trainable, tied, checkpointing):
    config = model_config(depth=6, layers=8, width=128, hidden=128, section=(4, 6, 6), tied=tied)
    model = tiny_model(config, vision_checkpointing=checkpointing, text_checkpointing=checkpointing)
    freeze(model, trainable)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda taken: setattr(taken, "grad", None))
    batch = pack([document(PACKS["one large image"][0], supervised=0.3), document([200], supervised=0.3)])
    model(batch).loss_sum.backward()
    gc.collect()
    peak = measure_peak(lambda: model(batch).loss_sum.backward()).peak_bytes
    estimate = activation_bytes(
        config, PackLengths.of(batch), trainable, Running(4, checkpointing, checkpointing, False)
    )
    # the output matrix's gradient is there from the forward pass on
    matrix = 4 * config.text.vocab_size * config.text.hidden_size * ("llm" in trainable)
    foretold = estimate.partitioned_peak + matrix
    # a module's gradients are counted together, while here each tensor's is taken as it comes; the merger has the most
    module = 4 * (4 * 128 * (4 * 128 + 128))
    assert peak * 0.95 < foretold < peak * 1.05 + module
    if trainable == {"vit", "merger", "llm"}:
        assert estimate.partitioned_peak < estimate.peak


def test_state_of_the_2b_under_each_stage_by_hand():
    everything = {"vit", "merger", "llm"}
    count = 2_208_985_600
    whole = state_bytes(ModelConfig(), everything, 0, 8)
    assert (whole.parameters, whole.gradients, whole.optimizer) == (2 * count, 4 * count, 12 * count)
    assert state_bytes(ModelConfig(), everything, 1, 8).optimizer == 12 * count // 8
    assert state_bytes(ModelConfig(), everything, 2, 8).gradients == 4 * count // 8
    split = state_bytes(ModelConfig(), everything, 3, 8)
    assert split.total == (2 + 4 + 12) * count // 8
    assert state_bytes(ModelConfig(), everything, 0, 1, Running(element_bytes=4)).optimizer == 8 * count


def test_frozen_parts_hold_neither_gradients_nor_state():
    vit = 631_183_360
    state = state_bytes(ModelConfig(), {"vit"}, 0, 1)
    assert (state.gradients, state.optimizer) == (4 * vit, 12 * vit)
    assert state_bytes(ModelConfig(), set(), 0, 1).optimizer == 0
