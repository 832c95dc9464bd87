"""The published sizes, built without memory: parameter counts, names and shapes."""

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.qwen2vl import Qwen2VL
from tests.model.builders import reference_name

SIZES = {
    "2b": (ModelConfig(), 2_208_985_600),
    "7b": (ModelConfig(text=TextConfig(152_064, 3584, 18_944, 28, 28, 4), tie_word_embeddings=False), 8_291_375_616),
    "72b": (ModelConfig(text=TextConfig(152_064, 8192, 29_568, 80, 64, 8), tie_word_embeddings=False), 73_405_560_320),
}


@pytest.mark.parametrize(("config", "parameters"), SIZES.values(), ids=SIZES.keys())
def test_published_sizes_have_the_published_tensors(config, parameters):
    with torch.device("meta"):
        model = Qwen2VL(config)
        reference = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config.to_hf()))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    theirs = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    assert {reference_name(name): shape for name, shape in shapes.items()} == theirs
    assert list(model.buffers()) == []


def test_published_biases_and_constants():
    with torch.device("meta"):
        names = dict(Qwen2VL(ModelConfig()).named_parameters())
    for projection in ("q_proj", "k_proj", "v_proj"):
        assert f"model.layers.0.self_attn.{projection}.bias" in names
    for absent in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert f"model.layers.0.{absent}.bias" not in names
    assert "visual.patch_embed.proj.bias" not in names
    assert names["visual.patch_embed.proj.weight"].shape == (1280, 3, 2, 14, 14)
    assert "lm_head.weight" not in names
    text = ModelConfig().text
    assert (text.rms_norm_eps, text.rope_theta, text.mrope_section) == (1e-6, 1e6, (16, 24, 24))
    assert (text.head_dim, VisionConfig().head_dim, VisionConfig().rope_theta) == (128, 80, 1e4)
