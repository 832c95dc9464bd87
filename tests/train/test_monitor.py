"""Figures: one JSON line each, forgotten after a resume; facts of a stage."""

import errno
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.sections import section_of
from qwen2vl_train.training import monitor as monitor_module
from qwen2vl_train.training import tracker
from qwen2vl_train.training.monitor import Monitor


@pytest.fixture
def monitor(tmp_path):
    return Monitor(tmp_path, MonitorConfig("disabled"), {}, active=True)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_figures_that_are_not_finite_are_null(tmp_path, monitor):
    monitor.log("vision", 1, {"loss": float("nan"), "gradient_norm": float("inf"), "fill": 0.5})
    assert lines(tmp_path) == [{"stage": "vision", "step": 1, "loss": None, "gradient_norm": None, "fill": 0.5}]


def test_a_resumed_stage_forgets_its_later_lines_and_a_half_line_only(tmp_path, monitor):
    for stage, step in (("vision", 1), ("vision", 2), ("multitask", 9), ("vision", 3)):
        monitor.log(stage, step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "vision", "step": null}\n{"stage": "vision", "st')
    monitor.forget_after("vision", 2)
    assert [(line["stage"], line["step"]) for line in lines(tmp_path)] == [
        ("vision", 1),
        ("vision", 2),
        ("multitask", 9),
    ]


def test_facts_of_a_stage_stand_in_its_folder_and_in_wandbs_settings(tmp_path, monkeypatch):
    kept = {}
    run = SimpleNamespace(
        config=SimpleNamespace(update=lambda facts, **how: kept.update(facts)), finish=lambda exit_code: None
    )
    monkeypatch.setattr(tracker, "_start", lambda *arguments: run)
    monitor = Monitor(tmp_path, MonitorConfig("offline"), {}, active=True)
    counts = {"vit": {"trainable": 0, "frozen": 7}, "llm": {"trainable": 5, "frozen": 0}}
    monitor.describe("instruct", "parameters", counts)
    monitor.close()
    assert json.loads((tmp_path / "instruct" / "parameters.json").read_text()) == counts
    assert kept == {"instruct.parameters": counts}


def test_a_stage_that_begins_anew_does_so_in_wandb_one_that_resumes_does_not(tmp_path, monitor, monkeypatch):
    anew = []
    monkeypatch.setattr(monitor._tracker, "begin_anew", anew.append)
    monitor.forget_after("vision", 100)
    assert anew == []
    monitor.forget_after("multitask", -1)
    assert anew == ["multitask"]


def test_a_silent_monitor_writes_nothing(tmp_path):
    silent = Monitor(tmp_path, MonitorConfig("online"), {}, active=False)
    silent.log("vision", 1, {"loss": 1.0})
    silent.describe("vision", "parameters", {})
    silent.close()
    assert not list(tmp_path.iterdir())


def test_a_log_file_shows_the_first_and_the_last_of_the_progress_and_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    """A resumed stage of 1,000 steps at 2 s a step; a log every 10 steps, 20 s."""
    now = [0.0]
    monkeypatch.setattr(monitor_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monitor = Monitor(tmp_path, MonitorConfig("disabled"), {}, active=True)
    monitor.start_progress("    vision", 1000, done=900)
    for step in range(910, 970, 10):
        now[0] += 20
        monitor.advance(step, f"loss {step / 1000:.3f}  99 tok/s  data wait 3%")
    monitor.stop_progress()
    assert capsys.readouterr().out.splitlines() == [
        "vision  910 of 1,000  loss 0.910  99 tok/s  data wait 3%  0:03:00 left",
        "vision  930 of 1,000  loss 0.930  99 tok/s  data wait 3%  0:02:20 left",
        "vision  950 of 1,000  loss 0.950  99 tok/s  data wait 3%  0:01:40 left",
        "vision  960 of 1,000  loss 0.960  99 tok/s  data wait 3%  0:01:20 left",
    ]
    monitor.start_progress("vision eval", 2)
    for done in (0, 1, 2):
        monitor.advance(done)
    monitor.stop_progress()
    assert capsys.readouterr().out.splitlines() == ["vision eval  0 of 2", "vision eval  2 of 2"]


def test_a_rank_that_is_not_watched_says_nothing_of_its_progress(tmp_path, capsys):
    silent = Monitor(tmp_path, MonitorConfig("disabled"), {}, active=False)
    silent.start_progress("vision", 10)
    silent.advance(10)
    silent.stop_progress()
    assert capsys.readouterr().out == ""


def test_charts_are_grouped_by_what_they_show():
    names = ["loss/scenes", "lr/vit", "mfu", "skipped/scenes/media", "held_out/caption_exact"]
    assert [section_of(name) for name in names] == ["loss", "optimisation", "throughput", "data", "evaluation"]


def test_figures_without_room_are_told_of_once_and_leave_no_half_line(tmp_path, monkeypatch):
    """A disk that takes a part of a line and then no more."""
    monitor = Monitor(tmp_path, MonitorConfig("disabled"), {}, active=True)
    notes = []
    monkeypatch.setattr(monitor, "warn", notes.append)
    monitor.log("vision", 1, {"loss": 1.0})

    class Full(io.FileIO):
        taken = False

        def write(self, content):
            if self.taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.taken = True
            return super().write(content[:10])

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r", **how: Full(path, mode.replace("b", "")))
        monitor.log("vision", 2, {"loss": 2.0})
        monitor.log("vision", 3, {"loss": 3.0})
    monitor.log("vision", 4, {"loss": 4.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]
    (note,) = notes
    assert "figures cannot be written, training goes on ([Errno 28] No space left on device" in note
    assert str(tmp_path / "metrics.jsonl") in note


def test_two_lines_that_ran_into_each_other_are_dropped_when_a_stage_resumes(tmp_path, monitor):
    """As earlier releases left them after a full disk."""
    monitor.log("vision", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "vis{"stage": "vision", "step": 2}\n')
    monitor.forget_after("vision", 2)
    assert [line["step"] for line in lines(tmp_path)] == [1]
