"""The folder that stage 1 starts from: a Qwen2 text model, a CLIP tower and a tokenizer in one Qwen2-VL folder."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2VLForConditionalGeneration

from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.assemble import assemble
from qwen2vl_train.model.config import VisionConfig
from tests.model.test_from_parts import clip_tower

VISION = VisionConfig(depth=2, embed_dim=32, num_heads=2)


@pytest.fixture
def parts(tmp_path):
    train_bpe(["a red square and a blue ring"] * 20, tmp_path / "tokenizer", vocab_size=300)
    size = TextTokenizer(tmp_path / "tokenizer").vocab_size
    config = Qwen2Config(
        vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "text")
    save_file(clip_tower(), tmp_path / "vision.safetensors")
    return tmp_path


def put_together(parts, **changes):
    places = {"text": parts / "text", "vision": parts / "vision.safetensors", "tokenizer": parts / "tokenizer"}
    return assemble(**(places | changes), out=parts / "out", seed=0, vision_config=VISION, dtype=torch.float32)


def test_the_assembled_folder_loads_in_transformers(parts):
    account = put_together(parts)
    assert {name.split(".")[1] for name in account.initialised} == {"merger"}
    model, loading = Qwen2VLForConditionalGeneration.from_pretrained(
        parts / "out", dtype="float32", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = Qwen2ForCausalLM.from_pretrained(parts / "text", dtype="float32")
    assert torch.equal(model.get_input_embeddings().weight, text.get_input_embeddings().weight)
    ids = torch.tensor([[5, 7, 11, 13]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, text(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_mistakes_name_the_place(parts):
    with pytest.raises(FileNotFoundError, match=r"--text .*no config\.json"):
        put_together(parts, text=parts / "nowhere")
    put_together(parts)
    with pytest.raises(ValueError, match="is not empty"):
        put_together(parts)
