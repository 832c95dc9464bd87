"""The chain's rules: where a stage starts, and that a begun run keeps its settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from data_pipelines.errors import UserError
from qwen2vl_train import stages
from qwen2vl_train.config import ConfigError
from qwen2vl_train.course import (
    initial_weights,
    is_stale,
    keep_settings,
    refuse_other_settings,
    refuse_other_weights,
    resume_of,
    settings_of,
)
from qwen2vl_train.export import CHECKSUMS, fingerprint
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.weights import save_hf
from qwen2vl_train.overrides import load_config
from qwen2vl_train.stages import _leave_course, _open_run, _run_stage, _summarise, _write_page
from qwen2vl_train.training.clock import RunClock
from qwen2vl_train.training.kept import write_json
from qwen2vl_train.training.lock import RunLock
from qwen2vl_train.training.manifest import checksum
from qwen2vl_train.training.restart import is_restart, job
from qwen2vl_train.training.stopping import Preempted, StopRequest
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


def checkpoint(run_dir, stage, step=1, **state):
    """The part of a checkpoint that the rules look at."""
    folder = run_dir / stage / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"stage": stage} | state))
    return folder


def export(run_dir, stage, value):
    """Export one tensor as `stage`'s model."""
    folder = run_dir / stage / "export"
    save_hf([("model.norm.weight", torch.full((4,), value))], folder, ModelConfig(), torch.float32)
    write_json(folder / CHECKSUMS, {"model.safetensors": checksum(folder / "model.safetensors")})
    return folder


def begin(run, config):
    """What opening a run writes and refuses, and a stage that begins keeps."""
    _open_run(run, Path(run.run_dir), config, World(0, 1, 0, torch.device("cpu")), RunLock(Path(run.run_dir)))
    keep_settings(run, "vision")
    checkpoint(Path(run.run_dir), "vision")


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


def test_when_what_fails_is_given_up_can_change_in_a_begun_stage_and_is_kept(tmp_path):
    begin(demo(tmp_path), {})
    changed = ("mixture.vision.captions.max_error_rate=0.2", "stages.vision.data.media.decode_timeout_s=5")
    begin(demo(tmp_path, *changed), {})  # the remedy that the error over max_error_rate names
    held = json.loads((tmp_path / "vision" / "settings.json").read_text())
    assert held["stages.vision.data.sources.captions.max_error_rate"] == 0.2
    assert held["stages.vision.data.media.decode_timeout_s"] == 5
    with pytest.raises(ConfigError, match=r"\(stages\.vision\.data\.media\.video_backend: was auto, is pyav\)"):
        refuse_other_settings(demo(tmp_path, "stages.vision.data.media.video_backend=pyav"), "vision")


def test_a_first_attempt_that_came_to_nothing_binds_nobody(tmp_path):
    mistaken = demo(tmp_path, "stages.vision.packs_per_step=8")
    _open_run(mistaken, tmp_path, {}, World(0, 1, 0, torch.device("cpu")), RunLock(tmp_path))
    keep_settings(mistaken, "vision")
    mended = demo(tmp_path, "stages.vision.packs_per_step=4")
    refuse_other_settings(mended, "vision")
    keep_settings(mended, "vision")
    assert json.loads((tmp_path / "vision" / "settings.json").read_text())["stages.vision.packs_per_step"] == 4
    (tmp_path / "vision" / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="packs_per_step: was 4, is 8"):
        refuse_other_settings(mistaken, "vision")


def test_a_setting_that_came_later_had_its_default_before(tmp_path):
    run = demo(tmp_path)
    begin(run, {})
    path = tmp_path / "vision" / "settings.json"
    held = json.loads(path.read_text())
    for key in ("stages.vision.optim.clip_norm", "stages.vision.data.sources.captions.max_error_rate"):
        del held[key]
    path.write_text(json.dumps(held))
    refuse_other_settings(run, "vision")
    with pytest.raises(ConfigError, match=r"\(stages\.vision\.optim\.clip_norm: was 1\.0, is 0\.25\)"):
        refuse_other_settings(demo(tmp_path, "stages.vision.optim.clip_norm=0.25"), "vision")
    with pytest.raises(ConfigError, match=r"sources\.more\.shards: was None, is .*set data_change=accept"):
        refuse_other_settings(demo(tmp_path, "mixture.vision.more={shards: [/s/*.tar], weight: 1}"), "vision")


def test_a_stage_begun_with_weights_that_were_trained_anew_is_refused_and_not_in_the_summary(tmp_path):
    run = demo(tmp_path)
    first = fingerprint(export(tmp_path, "vision", 1.0))
    for stage in ("language", "vision", "multitask", "instruct"):
        keep_settings(run, stage)
        checkpoint(tmp_path, stage)
        (tmp_path / stage / "result.json").write_text("{}")
    refuse_other_weights(run, "multitask")
    assert fingerprint(export(tmp_path, "vision", 1.0)) == first  # trained anew to the same end
    refuse_other_weights(run, "multitask")
    assert fingerprint(export(tmp_path, "vision", 2.0)) != first
    with pytest.raises(
        ConfigError, match=r"multitask was begun with other weights.*stage=multitask,instruct resume=none"
    ):
        refuse_other_weights(run, "multitask")
    _summarise(demo(tmp_path, "stage=vision"), tmp_path, 1.0, trained=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (list(summary["stages"]), summary["stale"]) == (["language", "vision"], ["multitask", "instruct"])
    assert summary["export"] == str(tmp_path / "vision" / "export")
    (tmp_path / "multitask" / "result.json").unlink()
    _summarise(demo(tmp_path, "stage=vision"), tmp_path, 1.0, trained=True)
    assert json.loads((tmp_path / "summary.json").read_text())["stale"] == ["instruct"]
    _leave_course(run, "multitask", "none")
    keep_settings(run, "multitask", "none")
    assert not is_stale(run, "multitask")
    shutil.rmtree(tmp_path / "vision" / "export")  # to save room
    refuse_other_weights(run, "instruct")


def test_a_restart_goes_on_with_what_its_job_has_done_and_does_the_rest_as_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = demo(tmp_path, "resume=none")
    for stage in ("vision", "multitask"):
        checkpoint(tmp_path, stage, job="slurm 12")
    assert resume_of(run, "vision", restarted=True) == "none"  # the first start did not come so far
    checkpoint(tmp_path, "vision", job="slurm 77")
    assert resume_of(run, "vision", restarted=True) == "auto"
    assert resume_of(run, "multitask", restarted=True) == "none"
    assert resume_of(run, "vision", restarted=False) == "none"


def test_a_restart_does_not_take_the_same_older_checkpoint_again_nor_miss_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    taken = checkpoint(tmp_path, "vision", step=5, job="torchrun run6")
    run = demo(tmp_path, f"resume={taken}")
    assert [resume_of(run, stage, restarted=True) for stage in ("language", "vision", "multitask")] == [
        "auto",
        str(taken),
        "none",
    ]
    checkpoint(tmp_path, "vision", step=9, job="torchrun run7")
    shutil.rmtree(taken)  # pruned meanwhile
    assert resume_of(run, "vision", restarted=True) == "auto"
    assert resume_of(run, "multitask", restarted=True) == "none"
    with pytest.raises(ConfigError, match=r"step-00000005/state\.json is missing"):
        resume_of(run, "vision", restarted=False)


def test_ranks_of_one_job_are_told_by_their_launchers(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (job(), is_restart()) == ("", False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert (job(), is_restart()) == ("torchrun run7", False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert (job(), is_restart()) == ("slurm 77", True)


def test_a_stage_that_starts_anew_leaves_nothing_of_the_old_course_unless_it_cannot_start(tmp_path):
    folder = tmp_path / "vision"
    names = ("result.json", "ledger-rank0.jsonl", "spikes.jsonl", "skipped_updates.jsonl")
    checkpoint(tmp_path, "vision")
    for name in names:
        (folder / name).write_text("")
    run = demo(tmp_path)
    with pytest.raises(ConfigError, match="holds no model; run that stage first"):
        _leave_course(run, "vision", "none")
    assert {path.name for path in folder.iterdir()} == {"checkpoints", *names}
    export(tmp_path, "language", 1.0)
    _leave_course(run, "vision", "none")
    assert not list(folder.iterdir())


def test_a_stage_whose_export_is_gone_is_trained_again_without_its_old_result(tmp_path, monkeypatch):
    folder = tmp_path / "language"
    write_json(folder / "result.json", {"steps": 150})
    at_first_step = []

    class Began(Exception):
        pass

    def begin(*_):
        at_first_step.extend(path.name for path in folder.iterdir())
        raise Began

    monkeypatch.setattr(stages, "TextTokenizer", lambda _: None)
    monkeypatch.setattr(stages, "index_data", lambda *_: None)
    monkeypatch.setattr(stages, "Trainer", lambda *_: SimpleNamespace(fit=begin))
    stop, watchdog = SimpleNamespace(obey=lambda *_: None), SimpleNamespace(note=lambda *_, **__: None)
    monitor = SimpleNamespace(console=Console(quiet=True))
    alone = SimpleNamespace(size=1, restarted=False, from_main=lambda work: work())
    with pytest.raises(Began):
        _run_stage(demo(tmp_path), "language", ModelConfig(), alone, monitor, stop, watchdog)
    assert "result.json" not in at_first_step
    write_json(folder / "result.json", {"steps": 150})
    write_json(folder / "export" / "config.json", {})
    assert not _run_stage(demo(tmp_path), "language", ModelConfig(), alone, monitor, stop, watchdog)
    assert (folder / "result.json").is_file()


def test_a_stop_in_the_evaluation_says_whether_the_last_steps_are_lost(tmp_path, monkeypatch):
    """A full disk kept the last step's checkpoint away: started again by itself, the run would lose the same steps."""
    monkeypatch.setattr(stages, "TextTokenizer", lambda _: None)
    monkeypatch.setattr(stages, "index_data", lambda *_: None)
    monkeypatch.setattr(stages, "evaluate", lambda *arguments: pytest.fail("it was asked to stop before"))
    monitor = SimpleNamespace(console=Console(quiet=True), start_progress=lambda *_: None, advance=lambda *_: None)
    alone = SimpleNamespace(
        size=1, restarted=False, device=torch.device("cpu"), from_main=lambda work: work(), sum=lambda flag: flag
    )
    run = demo(tmp_path, "stages.language.evaluate=true")
    watchdog = SimpleNamespace(note=lambda *_, **__: None)
    for kept, code, words in ((True, 75, "the same command continues"), (False, 74, "make room")):
        stop = StopRequest()

        def fit(*_, stop=stop, kept=kept):
            stop.requested = True
            return None, kept

        monkeypatch.setattr(stages, "Trainer", lambda *_, fit=fit: SimpleNamespace(fit=fit))
        with pytest.raises(Preempted, match=f"in the evaluation of language, 0 of .* {words}") as stopped:
            _run_stage(run, "language", ModelConfig(), alone, monitor, stop, watchdog)
        assert stopped.value.code == code


def test_a_page_that_cannot_be_made_does_not_fail_a_finished_run(tmp_path, monkeypatch):
    said = []
    for error in (TypeError("'int' object is not iterable"), OSError(28, "No space left on device")):

        def fail(_, error=error):
            raise error

        monkeypatch.setattr(stages, "write_report", fail)
        _write_page(tmp_path, SimpleNamespace(warn=said.append))
    assert "TypeError: 'int' object is not iterable" in said[0]
    assert "No space left on device" in said[1]
    assert all(f"qwen2vl report {tmp_path}" in text for text in said)


def test_a_named_checkpoint_is_taken_under_other_rates_but_not_with_other_groups_of_parameters(tmp_path):
    begin(demo(tmp_path), {})
    taken = f"resume={tmp_path / 'vision' / 'checkpoints' / 'step-00000001'}"
    alone = World(0, 1, 0, torch.device("cpu"))
    _open_run(demo(tmp_path, taken, "stages.vision.optim.lr.vit=0.5"), tmp_path, {}, alone, RunLock(tmp_path))
    with pytest.raises(ConfigError, match=r"\(stages\.vision\.optim\.vit_layer_decay: was 1\.0, is 0\.5\)"):
        _open_run(
            demo(tmp_path, taken, "stages.vision.optim.vit_layer_decay=0.5"), tmp_path, {}, alone, RunLock(tmp_path)
        )


def test_a_checkpoint_without_its_run_around_it_tells_its_own_settings(tmp_path):
    begin(written := demo(tmp_path / "run"), {})
    lone = tmp_path / "step-00000001"
    checkpoint(tmp_path / "run", "vision", settings=settings_of(written, "vision")).rename(lone)
    shutil.rmtree(tmp_path / "run")
    refuse_other_settings(demo(tmp_path / "other", "stages.vision.optim.lr.vit=0.5"), "vision", str(lone))
    for word, said in (
        ("model.config.text.hidden_size=64", r"model\.config\.text\.hidden_size: was 128, is 64"),
        ("stages.vision.optim.name=sgd", r"stages\.vision\.optim\.name: was adamw, is sgd"),
    ):
        words = [word, "model.config.text.mrope_section=[2,3,3]"] if "hidden" in word else [word]
        with pytest.raises(ConfigError, match=rf"resume={lone} was written with other settings \(.*{said}"):
            refuse_other_settings(demo(tmp_path / "other", *words), "vision", str(lone))
    checkpoint_of_an_older_release = checkpoint(tmp_path / "else", "vision")
    refuse_other_settings(demo(tmp_path / "other"), "vision", str(checkpoint_of_an_older_release))


def test_whether_a_begun_stage_is_scored_can_change(tmp_path):
    begin(demo(tmp_path), {})
    refuse_other_settings(demo(tmp_path, "stages.vision.evaluate=false"), "vision")
    path = tmp_path / "vision" / "settings.json"
    write_json(path, json.loads(path.read_text()) | {"stages.vision.evaluate": True})  # as releases before kept it
    refuse_other_settings(demo(tmp_path, "stages.vision.evaluate=false"), "vision")
    with pytest.raises(ConfigError, match="seed"):
        refuse_other_settings(demo(tmp_path, "stages.vision.evaluate=false", "seed=5"), "vision")


@pytest.mark.parametrize("content", ["", '{"seed": 1, "sta', "\0" * 9], ids=["empty", "cut", "zeros"])
def test_a_damaged_file_of_the_run_is_named_with_what_to_do(tmp_path, content):
    run = demo(tmp_path)
    keep_settings(run, "language")
    checkpoint(tmp_path, "language")
    settings, result = tmp_path / "language" / "settings.json", tmp_path / "language" / "result.json"
    settings.write_text(content)
    with pytest.raises(UserError, match=rf"{settings} is damaged \(.*\): restore it from a copy, or remove it"):
        refuse_other_settings(run, "language")
    settings.unlink()
    refuse_other_settings(run, "language")
    result.write_text(content)
    with pytest.raises(UserError, match=rf"{result} is damaged \(.*\): remove it"):
        _summarise(run, tmp_path, 1.0, trained=True)
