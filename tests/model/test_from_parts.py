"""Building a model from a Qwen2 checkpoint and an open_clip vision tower."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen2vl_train.model.attention import make_segments
from qwen2vl_train.model.from_parts import CombinedParts, inflate, load_from_parts
from qwen2vl_train.model.parts import part_of
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.vision import PatchProjection, VisionBlock, normalise
from tests.model.builders import VOCABULARY, all_logits, document, model_config, pack

CONFIG = model_config(depth=2, width=32)


class ClipBlock(nn.Module):
    """A residual block of open_clip's vision transformer, with its names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


def clip_tower(text_prefix: str = "") -> dict[str, Tensor]:
    """A CLIP state dict as open_clip writes it: vision tower, text tower, temperature."""
    torch.manual_seed(0)
    state = {
        "visual.class_embedding": torch.randn(32),
        "visual.positional_embedding": torch.randn(17, 32),
        "visual.proj": torch.randn(32, 16),
        "visual.conv1.weight": torch.randn(32, 3, 14, 14),
        f"{text_prefix}positional_embedding": torch.randn(7, 8),
        f"{text_prefix}text_projection": torch.randn(8, 16),
        f"{text_prefix}token_embedding.weight": torch.randn(11, 8),
        f"{text_prefix}ln_final.weight": torch.randn(8),
        f"{text_prefix}transformer.resblocks.0.attn.in_proj_weight": torch.randn(24, 8),
        "logit_scale": torch.tensor(4.6),
    }
    for name in ("ln_pre", "ln_post"):
        state |= {f"visual.{name}.weight": torch.randn(32), f"visual.{name}.bias": torch.randn(32)}
    for index in range(2):
        block = ClipBlock(32, 2)
        for name, value in block.state_dict().items():
            state[f"visual.transformer.resblocks.{index}.{name}"] = torch.randn_like(value) * 0.2
    return state


@pytest.fixture(params=["safetensors", "pytorch", "pytorch, wrapped"])
def vision_file(request, tmp_path):
    if request.param == "safetensors":
        path = tmp_path / "open_clip_model.safetensors"
        save_file(clip_tower(), path)
        return path
    path = tmp_path / "open_clip_pytorch_model.bin"
    wrapped = {f"module.{name}": value for name, value in clip_tower("text.").items()}
    torch.save(clip_tower() if request.param == "pytorch" else {"state_dict": wrapped, "epoch": 3}, path)
    return path


@pytest.fixture
def text_model(tmp_path):
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "qwen2")
    return model


def test_every_tensor_is_loaded_dropped_or_initialised(text_model, vision_file, tmp_path):
    model = Qwen2VL(CONFIG)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    account = load_from_parts(model, tmp_path / "qwen2", vision_file, seed=0)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert len(account.loaded) == sum(part_of(name) != "merger" for name in names)
    assert account.initialised == tuple(sorted(name for name in names if part_of(name) == "merger"))
    assert {"visual.class_embedding", "visual.proj", "visual.ln_pre.weight", "logit_scale"} <= set(account.dropped)
    assert account.summary() == f"{len(account.loaded)} tensors loaded, 13 dropped, 6 initialised"


def test_text_goes_on_as_the_text_model(text_model, vision_file, tmp_path):
    model = Qwen2VL(CONFIG)
    load_from_parts(model, tmp_path / "qwen2", vision_file, seed=0)
    batch = pack([document([23])])
    wanted = text_model(batch.input_ids[None]).logits[0]
    assert (all_logits(model, batch) - wanted).norm() / wanted.norm() < 1e-5


def test_a_vision_block_computes_what_clips_block_did(text_model, vision_file, tmp_path):
    model = Qwen2VL(CONFIG)
    load_from_parts(model, tmp_path / "qwen2", vision_file, seed=0)
    prefix = "visual.transformer.resblocks.1."
    clip = ClipBlock(32, 2)
    clip.load_state_dict({n.removeprefix(prefix): v for n, v in clip_tower().items() if n.startswith(prefix)})
    block = model.visual.blocks[1]
    assert isinstance(block, VisionBlock)
    x = torch.randn(9, 32)
    # angle zero: CLIP has no rotation
    still = torch.ones(9, 1, 16), torch.zeros(9, 1, 16)
    found = block(x, still, make_segments(torch.tensor([0, 9], dtype=torch.int32), 9, "reference"))
    assert torch.allclose(found, clip(x[None])[0], atol=1e-5)


def test_the_inflated_kernel_gives_the_2d_result_on_a_still_image():
    kernel = torch.randn(32, 3, 14, 14)
    projection = PatchProjection(32)
    projection.weight.data = inflate(kernel)
    image = torch.randint(0, 256, (6, 588), dtype=torch.uint8)
    found = projection(image, torch.zeros(0, 1176, dtype=torch.uint8))
    wanted = F.conv2d(normalise(image).view(6, 3, 14, 14), kernel).view(6, 32)
    assert torch.allclose(found, wanted, atol=1e-4)


def test_the_merger_is_random_and_repeats_with_its_seed(text_model, vision_file, tmp_path):
    models = [Qwen2VL(CONFIG) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        load_from_parts(model, tmp_path / "qwen2", vision_file, seed)
    first, again, other = (model.visual.merger.mlp[0].weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_tensor_without_a_rule_is_named(text_model, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file(clip_tower() | {"visual.attn_pool.query": torch.randn(3)}, path)
    with pytest.raises(ValueError, match=r"no rule for these tensors: .*visual\.attn_pool\.query"):
        CombinedParts(Qwen2VL(CONFIG), tmp_path / "qwen2", path, 0)


def test_a_tower_of_another_depth_or_width_is_refused(text_model, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file(clip_tower(), path)
    with pytest.raises(ValueError, match=r"missing visual\.blocks\.2\."):
        load_from_parts(Qwen2VL(model_config(depth=3)), tmp_path / "qwen2", path, 0)
    with pytest.raises(
        ValueError, match=r"visual\.blocks\.0\.attn\.proj\.bias has shape \[32\], the model wants \[64\]"
    ):
        load_from_parts(Qwen2VL(model_config(width=64)), tmp_path / "qwen2", path, 0)


def test_absent_or_foreign_files_are_named(text_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="open_clip weights are wanted"):
        CombinedParts(Qwen2VL(CONFIG), tmp_path / "qwen2", tmp_path / "none.bin", 0)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="a state dict of tensors"):
        CombinedParts(Qwen2VL(CONFIG), tmp_path / "qwen2", tmp_path / "list.pt", 0)
