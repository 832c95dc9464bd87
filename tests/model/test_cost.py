"""FLOPs against PyTorch's counter on our own forward and backward; parameters against the model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl_train.model.config import ModelConfig, TextConfig
from qwen2vl_train.model.cost import (
    Execution,
    PackLengths,
    model_flops_utilisation,
    pack_flops,
    parameter_counts,
    peak_flops_per_second,
)
from qwen2vl_train.model.parts import PARTS, freeze, part_of
from qwen2vl_train.model.qwen2vl import Qwen2VL
from tests.model.builders import document, model_config, pack, tiny_model

SETS = [{"vit", "merger"}, {"vit", "merger", "llm"}, {"llm"}, {"merger"}, {"vit"}, {"merger", "llm"}, set()]


def scores_and_values(query, key, value, *_, out_shape=None, **__) -> int:
    """Two products over whole squares; PyTorch's counter does not know the CPU's kernel, so its rule is given here."""
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[2] * size


def scores_and_values_backward(_grad, query, key, value, *_, out_shape=None, **__) -> int:
    return 5 * scores_and_values(query, key, value) // 2


CPU_KERNEL = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: scores_and_values,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: scores_and_values_backward,
}


def counted(model, batch) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=CPU_KERNEL)
    with counter:
        output = model(batch)
        if output.loss_sum.requires_grad:
            output.loss_sum.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trainable", SETS, ids=lambda parts: "+".join(sorted(parts)) or "nothing")
@pytest.mark.parametrize("checkpointing", [0, 1, 2])
def test_executed_flops_equal_pytorchs_counter(trainable, checkpointing):
    model = tiny_model(
        model_config(depth=3, layers=3), vision_checkpointing=checkpointing, text_checkpointing=checkpointing
    )
    freeze(model, trainable)
    batch = pack([document([5, ("image", (1, 4, 6)), 9, ("video", (2, 4, 4)), 3], supervised=0.3), document([30])])
    # on the CPU flash attention computes whole squares and recomputes the scores in backward
    execution = Execution(True, True, checkpointing, checkpointing)
    flops = pack_flops(model.config, PackLengths.of(batch), trainable, execution)
    assert flops.total == pytest.approx(counted(model, batch), rel=0.01)


def test_model_flops_of_the_2b_by_hand():
    # one document of 1,000 tokens with one image of 40 x 40 patches (400 tokens), 100 labels, everything trains
    lengths = PackLengths((1000,), (1600,), 1600, 0, 100)
    flops = pack_flops(ModelConfig(), lengths, set(PARTS))
    vit_layer = 2 * 1600 * (12 * 1280**2) + 4 * 1600**2 * 1280
    assert flops.vit == 3 * 32 * vit_layer + 2 * 2 * 588 * 1280 * 1600
    assert flops.merger == 3 * 2 * 400 * (5120 * 5120 + 5120 * 1536)
    text_layer = 2 * 1000 * (1536 * (1536 + 256 + 256 + 1536) + 3 * 1536 * 8960) + 4 * 500_500 * 1536
    assert flops.llm == 3 * 28 * text_layer
    assert flops.head == 3 * 2 * 100 * 1536 * 151_936


def test_documents_do_not_pay_for_each_other():
    config = ModelConfig()
    whole = pack_flops(config, PackLengths((4000,), (4,), 4, 0, 0), {"llm"})
    split = pack_flops(config, PackLengths((1000,) * 4, (4,), 4, 0, 0), {"llm"})
    assert whole.llm - split.llm == 3 * 28 * 4 * 1536 * (4000 * 4001 - 4 * 1000 * 1001) // 2


def test_frozen_parts_are_counted_for_what_they_do():
    lengths = PackLengths((500,), (400,), 400, 0, 50)
    everything = pack_flops(ModelConfig(), lengths, {"vit", "merger", "llm"})
    vision = pack_flops(ModelConfig(), lengths, {"vit", "merger"})
    instruct = pack_flops(ModelConfig(), lengths, {"llm"})
    assert vision.head * 3 == everything.head * 2
    assert instruct.vit * 3 == pytest.approx(everything.vit, rel=0.01)  # forward alone
    assert instruct.llm == everything.llm


@pytest.mark.parametrize(
    "config",
    [
        model_config(),
        model_config(tied=False, depth=3, kv_heads=1),
        ModelConfig(),
        ModelConfig(text=TextConfig(152_064, 3584, 18_944, 28, 28, 4), tie_word_embeddings=False),
    ],
)
def test_parameters_by_part_equal_the_models(config):
    with torch.device("meta"):
        model = Qwen2VL(config)
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
    assert parameter_counts(config) == found


def test_utilisation_is_flops_over_time_and_peak():
    assert model_flops_utilisation(500, 2.0, 1000.0) == 0.25


def test_the_peak_that_utilisation_counts_against_is_that_of_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    card = torch.device("cuda")
    assert peak_flops_per_second(card, torch.bfloat16) == 989e12
    assert peak_flops_per_second(card, torch.float32) == 67e12  # no TF32
    assert peak_flops_per_second(torch.device("cpu"), torch.float32) is None
