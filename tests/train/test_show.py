"""`qwen2vl show`: an experiment's configuration gives the settings that decide its packs."""

import json

import pytest

from data_pipelines.report.data_run import read_data_run
from qwen2vl_train.config import ConfigError
from qwen2vl_train.overrides import load_config
from qwen2vl_train.show import data_run
from qwen2vl_train.training.balancing import write_pack_cost


def test_the_stage_seed_and_ranks_of_the_overrides_decide_the_packs():
    run, _ = load_config(["experiment=demo", "seed=7", "stages.multitask.packs_per_step=6"])
    settings = data_run(run, "multitask", 3)
    assert (settings.seed, settings.packs_per_step, settings.world) == (7, 6, 3)
    assert settings.data == run.stages["multitask"].data
    assert settings.tokenizer == run.data.tokenizer


def test_the_only_stage_needs_no_name():
    run, _ = load_config(["experiment=demo", "stage=vision"])
    assert data_run(run, None, 1).data == run.stages["vision"].data


def test_impossible_stages_and_ranks_are_refused():
    run, _ = load_config(["experiment=demo"])
    with pytest.raises(ConfigError, match="choose one of"):
        data_run(run, None, 1)
    with pytest.raises(ConfigError, match="choose one of"):
        data_run(run, "dessert", 1)
    with pytest.raises(ConfigError, match="not a multiple of world=7"):
        data_run(run, "vision", 7)


def test_packs_are_dealt_by_the_cost_that_the_trainer_leaves_in_the_stage_folder(tmp_path):
    run, settings = load_config(["experiment=demo"])
    cost = data_run(run, "multitask", 2).cost
    assert cost is not None
    assert min(cost.per_token, cost.per_token_pair, cost.per_patch, cost.per_patch_pair) > 0
    (tmp_path / "config.json").write_text(json.dumps(settings))
    write_pack_cost(tmp_path / "multitask", cost)
    assert read_data_run(tmp_path, "multitask").cost == cost
    assert read_data_run(tmp_path, "instruct").cost is None
