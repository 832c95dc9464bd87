"""Weights in and out: identity, other names, partitions, and errors that name the tensor."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from data_pipelines.errors import UserError
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import InitialValues, initialise, load, load_hf, model_tensors, save_hf
from tests.model.builders import (
    all_logits,
    document,
    model_config,
    pack,
    reference_inputs,
    reference_model,
    tiny_model,
)


def same(first: Qwen2VL, second: Qwen2VL) -> bool:
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_import_of_an_export_is_the_identity(tmp_path, tied, shard_bytes):
    model = tiny_model(model_config(tied=tied))
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32, shard_bytes)
    again = Qwen2VL(model.config)
    load_hf(again, tmp_path)
    assert same(model, again)
    names = {path.name for path in tmp_path.iterdir()}
    if shard_bytes > 1_000_000:
        assert names == {"config.json", "model.safetensors"}
    else:
        assert "model.safetensors.index.json" in names
        assert all(load_file(tmp_path / name) for name in names if name.endswith(".safetensors"))


def test_a_bf16_export_is_the_rounded_model(tmp_path):
    model = tiny_model()
    save_hf(model_tensors(model), tmp_path, model.config, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = Qwen2VL(model.config)
    load_hf(again, tmp_path)
    assert same(again, model.bfloat16().float())


def test_transformers_loads_the_export_without_missing_keys_and_agrees(tmp_path):
    for tied in (True, False):
        model = tiny_model(model_config(tied=tied))
        folder = tmp_path / str(tied)
        save_hf(model_tensors(model), folder, model.config, torch.float32, 50_000)
        reference, found = Qwen2VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(found.values()), found
        batch = pack([document([2, ("image", (1, 4, 2)), 3, ("video", (2, 2, 2)), 4])])
        logits = reference(**reference_inputs(batch)).logits[0]
        assert (all_logits(model, batch) - logits).norm() / logits.norm() < 1e-5


def test_folders_saved_by_transformers_are_read(tmp_path):
    model = tiny_model(model_config(tied=False))
    reference_model(model).save_pretrained(tmp_path, max_shard_size="100KB")
    again = Qwen2VL(model.config)
    load_hf(again, tmp_path)
    assert same(model, again)


def test_the_nesting_of_transformers_5_is_read(tmp_path):
    model = tiny_model(model_config(tied=False))
    save_file({name: value.contiguous() for name, value in reference_model(model).state_dict().items()},
              tmp_path / "model.safetensors")  # fmt: skip
    again = Qwen2VL(model.config)
    load_hf(again, tmp_path)
    assert same(model, again)


def test_a_tied_models_stored_head_is_dropped(tmp_path):
    model = tiny_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    again = Qwen2VL(model.config)
    load_hf(again, tmp_path)
    assert same(model, again)


def test_missing_unexpected_and_misshaped_tensors_are_named_and_nothing_is_changed(tmp_path):
    model = tiny_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state.pop("visual.merger.ln_q.bias")
    state["model.norm.weight"] = torch.ones(3)
    state["model.extra"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors")
    again = tiny_model(seed=5)
    before = {name: value.clone() for name, value in again.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing visual\.merger\.ln_q\.bias") as caught:
        load_hf(again, tmp_path)
    assert str(caught.value).startswith(f"the weights in {tmp_path} do not fit the model: ")
    assert "unexpected model.extra" in str(caught.value)
    assert "model.norm.weight has shape [3], the model wants [64]" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        load_hf(tiny_model(), tmp_path)
    model = tiny_model()
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32, 40_000)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="shards missing: model-00002-"):
        load_hf(model, tmp_path)


def test_pickled_weights_alone_are_refused_in_one_line_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"{tmp_path}: .*pytorch_model\.bin is not read.* save the model as safetensors"
    ):
        load_hf(tiny_model(), tmp_path)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_a_file_that_was_cut_short_is_named(tmp_path, shard_bytes):
    model = tiny_model()
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32, shard_bytes)
    damaged = sorted(tmp_path.glob("*.safetensors"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{damaged} \([\d,]+ bytes\) is no whole safetensors file"):
        load_hf(model, tmp_path)


def test_a_shorter_export_replaces_a_longer_one(tmp_path):
    model = tiny_model()
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32, 40_000)
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_initial_values_depend_on_seed_and_name_alone():
    first, second = Qwen2VL(model_config()), Qwen2VL(model_config(depth=3, layers=4))
    initialise(first, 7)
    initialise(second, 7)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    initialise(second, 8)
    assert not torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)


def test_initial_values_have_the_asked_for_spread():
    model = Qwen2VL(model_config(width=64, hidden=64))
    initialise(model, 0)
    assert model.visual.merger.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    initialise(model, 0, std=0.06, residual_scaling=True)
    assert model.visual.merger.mlp[0].weight.std().item() == pytest.approx(0.06, rel=0.05)
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.06 / math.sqrt(4), rel=0.05)
    assert model.visual.blocks[0].norm1.weight.unique().tolist() == [1.0]
    assert model.visual.blocks[0].norm1.bias.unique().tolist() == [0.0]
    assert model.model.norm.weight.unique().tolist() == [1.0]
    assert model.model.layers[0].self_attn.q_proj.bias.unique().tolist() == [0.0]


def partition(model: Qwen2VL, world: int) -> None:
    """Make every parameter look as ZeRO-3 leaves it: no elements of its own, one padded share in `ds_tensor`."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        share = torch.full((-(-parameter.numel() // world),), float("nan"))
        share.ds_numel = share.numel()
        parameter.ds_tensor = share
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_partitions_take_their_own_elements(tmp_path, world):
    model = tiny_model()
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32, 60_000)
    shares = []
    for rank in range(world):
        part = Qwen2VL(model.config)
        partition(part, world)
        load_hf(part, tmp_path, rank)
        shares.append(dict(part.named_parameters()))
    for name, parameter in model.named_parameters():
        joined = torch.cat([share[name].ds_tensor for share in shares])[: parameter.numel()]
        assert torch.equal(joined.view(parameter.shape), parameter)


def test_partitions_of_random_values_equal_the_whole():
    whole = Qwen2VL(model_config())
    initialise(whole, 3)
    parts = []
    for rank in range(2):
        part = Qwen2VL(model_config())
        partition(part, 2)
        load(part, InitialValues(part, 3), rank)
        parts.append(dict(part.named_parameters()))
    for name, parameter in whole.named_parameters():
        joined = torch.cat([part[name].ds_tensor for part in parts])[: parameter.numel()]
        assert torch.equal(joined.view(parameter.shape), parameter)


def test_only_what_a_partition_needs_is_read(tmp_path):
    model = tiny_model()
    save_hf(model_tensors(model), tmp_path, model.config, torch.float32)
    read = []

    class Counting(InitialValues):
        def read(self, name, start, stop):
            read.append(stop - start)
            return super().read(name, start, stop)

    part = Qwen2VL(model.config)
    partition(part, 4)
    load(part, Counting(part, 0), 1)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(read) <= total / 4 + len(read)
