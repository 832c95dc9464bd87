"""`model.config.positions=1d` from the command line to the packs, the export and the answers: the paper's ablation."""

import json
from dataclasses import replace

import pytest
import torch

from data_pipelines.config import SourceConfig
from data_pipelines.loader import PackLoader
from data_pipelines.streaming import StreamLoader
from qwen2vl_train.config import ConfigError
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.overrides import load_config
from tests.data.tiny_shards import make_tiny_shards


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_shards(tmp_path_factory.mktemp("positions"))


def stage_of(tiny, *overrides):
    """The demo's second stage, on the tiny pictures."""
    limits = ["shared.plan={max_tokens: 192, max_patches: 768, pool_size: 6}", "shared.loader.num_workers=1"]
    run, settings = load_config(["experiment=demo", *limits, *overrides])
    sources = {"pictures": SourceConfig((f"{tiny.folder}/pictures-*.tar",))}
    return run, settings, replace(run.stages["vision"].data, sources=sources)


def counted(pack):
    """Every token's number in its document, on all three axes."""
    lengths = pack.cu_seqlens.diff().tolist()
    return torch.cat([torch.arange(length) for length in lengths]).expand(3, -1)


@pytest.mark.parametrize(("reader", "loader"), [("index", PackLoader), ("webdataset", StreamLoader)])
def test_the_positions_of_a_run_reach_the_packs_that_its_stages_train_on(tiny, reader, loader):
    packs = {}
    for positions in ("mrope", "1d"):
        override = (f"stages.vision.data.reader={reader}", f"model.config.positions={positions}")
        packs_of = loader(stage_of(tiny, *override)[2], tiny.tokenizer, 2, 0, 1, 0)
        packs[positions] = next(iter(packs_of))
        packs_of.close()
    for plain, mrope in zip(packs["1d"], packs["mrope"], strict=True):
        assert not plain.dummy_vision
        assert torch.equal(plain.input_ids, mrope.input_ids)
        assert torch.equal(plain.position_ids, counted(plain))
        assert not torch.equal(mrope.position_ids, counted(mrope))


def test_run_and_export_say_which_positions_they_have(tiny):
    run, settings, data = stage_of(tiny, "model.config.positions=1d")
    assert {stage.data.positions for stage in run.stages.values()} == {data.positions} == {"1d"}
    assert settings["model"]["config"]["positions"] == "1d"
    written = json.loads(json.dumps(run.model.config.to_hf()))
    assert written["positions"] == "1d"
    assert ModelConfig.from_hf(written) == run.model.config
    assert "positions" not in ModelConfig().to_hf()  # the published form


def test_a_stage_with_other_positions_than_its_model_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"stages\.vision\.data\.positions=1d.* set model\.config\.positions"):
        stage_of(tiny, "stages.vision.data.positions=1d")
