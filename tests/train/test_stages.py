"""The chain's rules: where a stage starts, and that a begun run keeps its settings."""

import json
from dataclasses import replace

import pytest

from qwen2vl_train.config import ConfigError, load_config
from qwen2vl_train.stages import _hold_settings, _summarise, initial_weights
from qwen2vl_train.training.clock import RunClock


def demo(tmp_path, *overrides):
    return load_config(["experiment=demo", f"run_dir={tmp_path}", *overrides])[0]


def test_a_first_stage_says_where_it_starts(tmp_path):
    run, _ = load_config(["experiment=qwen2vl_2b", "data.root=/s", "data.tokenizer=/t", f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"stages\.vision\.init_from=previous: vision is the first stage"):
        initial_weights(run, "vision")
    assert initial_weights(demo(tmp_path), "language") is None


def test_a_stage_starts_from_the_export_before_it(tmp_path):
    run = demo(tmp_path)
    with pytest.raises(ConfigError, match="holds no model; run that stage first"):
        initial_weights(run, "multitask")
    export = tmp_path / "vision" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert initial_weights(run, "multitask") == export


def test_the_minutes_are_of_all_invocations_and_a_repetition_adds_none(tmp_path):
    (tmp_path / "elapsed.json").write_text('{"seconds": 600}')
    clock = RunClock(tmp_path)
    clock.save()
    assert 600 <= RunClock(tmp_path).seconds() < 700
    run = demo(tmp_path)
    (tmp_path / "instruct").mkdir()
    (tmp_path / "instruct" / "result.json").write_text("{}")
    _summarise(run, tmp_path, clock.seconds() / 60, trained=True)
    _summarise(run, tmp_path, 99.0, trained=False)
    assert 10 <= json.loads((tmp_path / "summary.json").read_text())["minutes"] < 12


def test_other_settings_in_a_begun_stage_are_refused_by_name(tmp_path):
    _hold_settings(demo(tmp_path), "vision", anew=False)
    _hold_settings(demo(tmp_path, "shared.loader.num_workers=3"), "vision", anew=False)  # changes nothing trained
    changed = demo(tmp_path, "stages.vision.optim.lr.vit=0.5")
    with pytest.raises(ConfigError, match=r"stages\.vision\.optim\.lr\.vit: was 0\.001, is 0\.5"):
        _hold_settings(changed, "vision", anew=False)
    with pytest.raises(ConfigError, match="seed: was 0, is 7"):
        _hold_settings(replace(demo(tmp_path), seed=7), "vision", anew=False)
    other_data = demo(tmp_path, "mixture.vision.captions.weight=2")
    with pytest.raises(
        ConfigError, match=r"captions\.weight: was 1\.0, is 2\.0\). Restore them, set data_change=accept"
    ):
        _hold_settings(other_data, "vision", anew=False)
    _hold_settings(replace(other_data, data_change="accept"), "vision", anew=False)
    _hold_settings(other_data, "vision", anew=False)
    with pytest.raises(ConfigError, match=r"optim\.lr\.vit: was 0\.001, is 0\.5\). Restore them, choose"):
        _hold_settings(replace(changed, data_change="accept"), "vision", anew=False)
    _hold_settings(changed, "vision", anew=True)
    assert json.loads((tmp_path / "vision" / "settings.json").read_text())["stages.vision.optim.lr.vit"] == 0.5
