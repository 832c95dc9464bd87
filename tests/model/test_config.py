"""Reading and writing the published config.json."""

import json

import pytest
from transformers import AutoConfig, Qwen2VLConfig

from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from tests.model.builders import model_config

# the released Qwen2-VL-2B-Instruct file, without keys that do not change the model
PUBLISHED_2B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_the_published_file_gives_the_2b_model():
    assert ModelConfig.from_hf(PUBLISHED_2B) == ModelConfig()


def test_what_is_written_is_the_published_form():
    written = ModelConfig().to_hf()
    for key, value in PUBLISHED_2B.items():
        if isinstance(value, dict):
            assert value.items() <= written[key].items(), key
        else:
            assert written[key] == value, key


@pytest.mark.parametrize(
    "config", [ModelConfig(), model_config(), model_config(tied=False, kv_heads=1), ModelConfig(positions="1d")]
)
def test_reading_what_was_written_changes_nothing(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == config
    assert ModelConfig.from_hf(tmp_path / "config.json") == config


def test_the_nested_form_of_transformers_5_is_read(tmp_path):
    config = model_config()
    Qwen2VLConfig(**config.to_hf()).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_hf(tmp_path) == config


def test_transformers_reads_what_was_written(tmp_path):
    config = model_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, Qwen2VLConfig)
    assert theirs.text_config.hidden_size == 64
    assert theirs.text_config.rms_norm_eps == 1e-6
    assert theirs.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert theirs.vision_config.embed_dim == 32
    assert theirs.vision_config.hidden_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.type is 'yarn'"),
        ({"vision_config": {**PUBLISHED_2B["vision_config"], "patch_size": 16}}, "patch_size is 16"),
        ({"vision_config": {**PUBLISHED_2B["vision_config"], "hidden_size": 8}}, "vision_config.hidden_size 8"),
        ({"positions": "2d"}, "positions is '2d'; this model computes only 'mrope', '1d'"),
        ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, "sums to 63"),
    ],
)
def test_models_that_are_not_computed_here_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**PUBLISHED_2B, **change})


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="embed_dim 100"):
        VisionConfig(embed_dim=100, num_heads=3)
    with pytest.raises(ValueError, match="head size 6"):
        VisionConfig(embed_dim=24, num_heads=4)
    with pytest.raises(ValueError, match="hidden_size 100"):
        TextConfig(hidden_size=100, num_attention_heads=3)
