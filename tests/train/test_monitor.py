"""Figures: one JSON line each, forgotten after a resume, and wandb that can be away, fail or hang without harm."""

import errno
import io
import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.sections import section_of
from qwen2vl_train.training import tracker
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.tracker import Tracker, choose_mode


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
        file.write('{"stage": "vision", "st')
    monitor.forget_after("vision", 2)
    assert [(line["stage"], line["step"]) for line in lines(tmp_path)] == [
        ("vision", 1),
        ("vision", 2),
        ("multitask", 9),
    ]


def test_facts_of_a_stage_stand_in_its_folder_and_in_wandbs_settings(tmp_path, monitor):
    kept = {}
    monitor._tracker._run = SimpleNamespace(config=SimpleNamespace(update=lambda facts, **how: kept.update(facts)))
    counts = {"vit": {"trainable": 0, "frozen": 7}, "llm": {"trainable": 5, "frozen": 0}}
    monitor.describe("instruct", "parameters", counts)
    assert json.loads((tmp_path / "instruct" / "parameters.json").read_text()) == counts
    assert kept == {"instruct.parameters": counts}


def test_a_silent_monitor_writes_nothing(tmp_path):
    silent = Monitor(tmp_path, MonitorConfig("online"), {}, active=False)
    silent.log("vision", 1, {"loss": 1.0})
    silent.describe("vision", "parameters", {})
    silent.close()
    assert not list(tmp_path.iterdir())


def test_wandb_goes_offline_at_once_when_its_server_is_away(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    notes = []
    start = time.monotonic()
    assert choose_mode("auto", notes.append) == "offline"
    assert time.monotonic() - start < 5
    assert "does not answer" in notes[0]
    assert choose_mode("disabled", notes.append) == "disabled"
    assert choose_mode("offline", notes.append) == "offline"


class FailingRun:
    def define_metric(self, name, step_metric):
        self.defined = name

    def log(self, figures):
        raise ConnectionError("the server went away")

    def finish(self, exit_code):
        time.sleep(60)


def test_an_error_of_wandb_switches_it_off_and_closing_never_waits_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "_start", lambda *arguments: FailingRun())
    monkeypatch.setattr(tracker, "_CLOSE_S", 0.2)
    notes = []
    hanging, failing = (Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append) for _ in range(2))
    start = time.monotonic()
    hanging.close(failed=False)
    assert time.monotonic() - start < 5
    assert "did not finish" in notes.pop()
    failing.log("vision", 1, {"loss": 1.0})
    assert "the server went away" in notes.pop()
    failing.log("vision", 2, {"loss": 1.0})
    failing.close(failed=True)
    assert notes == []


def test_charts_are_grouped_by_what_they_show():
    names = ["loss/scenes", "lr/vit", "mfu", "skipped/scenes/media", "held_out/caption_exact"]
    assert [section_of(name) for name in names] == ["loss", "optimisation", "throughput", "data", "evaluation"]


def test_behind_a_proxy_it_is_the_proxy_that_must_answer(monkeypatch):
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        port = proxy.getsockname()[1]
        for name in ("no_proxy", "NO_PROXY", "https_proxy", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")  # no name server knows it
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        notes = []
        assert choose_mode("online", notes.append) == "online"
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")  # the form without a scheme
        assert choose_mode("online", notes.append) == "online"
        monkeypatch.setenv("NO_PROXY", "wandb.invalid")
        assert notes == []
        assert choose_mode("online", notes.append) == "offline"
        assert "wandb.invalid:443 does not answer" in notes[0]


def test_what_fails_on_the_way_online_makes_the_run_offline(tmp_path, monkeypatch):
    modes = []

    def start(folder, config, settings, mode):
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("the run was not made in time")
        return FailingRun()

    monkeypatch.setattr(tracker, "choose_mode", lambda wanted, note: "online")
    monkeypatch.setattr(tracker, "_start", start)
    monkeypatch.setattr(tracker, "_CLOSE_FAILED_S", 0.2)
    notes = []
    run = Tracker(tmp_path, MonitorConfig("online"), {}, notes.append)
    assert modes == ["online", "offline"]
    assert "not made in time; `wandb sync` can send it later" in notes.pop()
    began = time.monotonic()
    run.close(failed=True)  # other ranks wait to hear of the failure: not a minute
    assert time.monotonic() - began < 5
    assert "did not finish" in notes.pop()


def test_a_server_that_takes_the_call_and_never_answers_makes_the_run_offline(tmp_path, monkeypatch):
    """With wandb itself, whose failed start holds the run's id until it is torn down."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.delenv("http_proxy", raising=False)
        monkeypatch.delenv("HTTP_PROXY", raising=False)
        monkeypatch.setattr(tracker, "_INIT_S", 2.0)
        notes = []
        run = Tracker(tmp_path, MonitorConfig("online"), {}, notes.append)
        run.log("vision", 1, {"loss": 1.0})
        run.close(failed=False)
    assert len(notes) == 1
    assert "wandb is offline: CommError" in notes[0]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


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
