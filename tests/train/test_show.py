"""`qwen2vl show`: an experiment's configuration gives the settings that decide its packs."""

import pytest

from qwen2vl_train.config import ConfigError, load_config
from qwen2vl_train.show import data_run


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
