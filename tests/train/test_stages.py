"""The chain's rules: where a stage starts, and that a begun run keeps its settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl_train.config import ConfigError, load_config
from qwen2vl_train.stages import _keep_settings, _open_run, _summarise, initial_weights
from qwen2vl_train.training.clock import RunClock
from qwen2vl_train.training.world import World


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


def begin(run, config):
    """What opening a run writes and refuses, and a stage that begins keeps."""
    _open_run(run, Path(run.run_dir), config, World(0, 1, 0, torch.device("cpu")))
    _keep_settings(run, "vision")


def test_other_settings_in_a_begun_stage_are_refused_by_name(tmp_path):
    begin(demo(tmp_path), {"is": "old"})
    begin(demo(tmp_path, "shared.loader.num_workers=3"), {"is": "old"})  # changes nothing trained
    changed = demo(tmp_path, "stages.vision.optim.lr.vit=0.5")
    with pytest.raises(ConfigError, match=r"stages\.vision\.optim\.lr\.vit: was 0\.001, is 0\.5"):
        begin(changed, {"is": "new"})
    with pytest.raises(ConfigError, match="seed: was 0, is 7"):
        begin(replace(demo(tmp_path), seed=7), {"is": "new"})
    assert json.loads((tmp_path / "config.json").read_text()) == {"is": "old"}  # refused, so without a trace
    other_data = demo(tmp_path, "mixture.vision.captions.weight=2")
    with pytest.raises(
        ConfigError, match=r"captions\.weight: was 1\.0, is 2\.0\). Restore them, set data_change=accept"
    ):
        begin(other_data, {})
    begin(replace(other_data, data_change="accept"), {})
    begin(other_data, {})
    with pytest.raises(ConfigError, match=r"optim\.lr\.vit: was 0\.001, is 0\.5\). Restore them, choose"):
        begin(replace(changed, data_change="accept"), {})
    begin(replace(changed, resume="none"), {"is": "new"})
    assert json.loads((tmp_path / "config.json").read_text()) == {"is": "new"}
    assert json.loads((tmp_path / "vision" / "settings.json").read_text())["stages.vision.optim.lr.vit"] == 0.5
