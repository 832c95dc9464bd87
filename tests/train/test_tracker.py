"""wandb can be away, refuse, fail, die or hang without harm; what it is given is what was measured."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.training import tracker
from qwen2vl_train.training.shown import Box, Shown
from qwen2vl_train.training.tracker import Tracker, choose_mode

KEY = "x" * 40


@pytest.fixture(autouse=True)
def environment(tmp_path_factory, monkeypatch):
    """Nobody is logged in, and wandb writes nothing into the home folder."""
    home = tmp_path_factory.mktemp("home")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in ("WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(home / name))
    return home


@contextmanager
def listening():
    """The port of a server that takes calls and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


class Run:
    """Takes the place of wandb's run: `log` does what it is told."""

    def __init__(self, log=lambda figures: None, finish=lambda exit_code=0: None):
        self.log, self.finish = log, finish
        self.facts = {}
        self.config = SimpleNamespace(update=lambda facts, allow_val_change: self.facts.update(facts))

    def define_metric(self, name, step_metric):
        self.defined = name


@pytest.fixture
def start(monkeypatch):
    """Let trackers start with the run that is passed, without wandb."""

    def use(run):
        monkeypatch.setattr(tracker, "_start", lambda *arguments: run)
        monkeypatch.setattr(tracker, "_tear_down", lambda: None)

    return use


def raise_connection_error(figures):
    raise ConnectionError("the server went away")


# ---------------------------------------------------------------------------------------------------------------------
# online or offline


def test_wandb_goes_offline_at_once_when_its_server_is_away(monkeypatch):
    with listening() as port:
        pass
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    notes = []
    start = time.monotonic()
    assert choose_mode("auto", notes.append) == "offline"
    assert time.monotonic() - start < 5
    assert "does not answer" in notes[0]
    assert choose_mode("disabled", notes.append) == "disabled"
    assert choose_mode("offline", notes.append) == "offline"


@pytest.mark.parametrize(("setting", "variable"), [("online", None), ("auto", "online"), ("auto", None)])
def test_without_an_api_key_wandb_is_offline_with_a_note_and_asks_nobody(monkeypatch, setting, variable):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    notes = []
    with listening() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert choose_mode(setting, notes.append) == "offline"
    (note,) = notes
    assert f"no API key for 127.0.0.1:{port}" in note


@pytest.mark.parametrize("form", ["127.0.0.1:{port}", "127.0.0.1"])
def test_a_login_in_netrc_counts_for_the_server_that_it_names(monkeypatch, environment, form):
    notes = []
    with listening() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        netrc = environment / "netrc"
        netrc.write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
        assert choose_mode("auto", notes.append) == "offline"
        netrc.write_text(f"machine {form.format(port=port)}\n login user\n password {KEY}\n")
        assert choose_mode("auto", notes.append) == "online"
    assert len(notes) == 1


def test_the_public_server_is_one_under_its_two_names(environment):
    (environment / "netrc").write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
    assert tracker._login("https://api.forge.coreweave.com") == {"api_key": KEY}
    assert tracker._login("https://api.wandb.ai") == {"api_key": KEY}
    assert tracker._login("https://wandb.example.org") is None


def test_a_netrc_that_others_may_read_counts_as_it_does_for_wandb(monkeypatch, tmp_path):
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracker._login("https://api.wandb.ai") is None
    usual = tmp_path / ".netrc"
    usual.write_text(f"default login user password {KEY}\n")
    usual.chmod(0o644)
    assert tracker._login("https://api.wandb.ai") == {"api_key": KEY}
    usual.rename(tmp_path / "_netrc")
    assert tracker._login("https://api.wandb.ai") == {"api_key": KEY}


def test_the_environments_old_word_for_offline_is_understood(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with listening() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert choose_mode("auto", print) == "offline"


def test_the_environment_can_switch_wandb_off(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = Tracker(tmp_path, MonitorConfig("auto"), {}, print)
    run.log("vision", 1, {"loss": 1.0})
    run.close(failed=False)
    assert not list(tmp_path.iterdir())


def test_behind_a_proxy_it_is_the_proxy_that_must_answer(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with listening() as port:
        for name in ("no_proxy", "NO_PROXY", "https_proxy"):
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


def test_what_fails_on_the_way_online_makes_the_run_offline(tmp_path, monkeypatch, start):
    modes = []

    def open_run(folder, config, settings, mode):
        modes.append(mode)
        if mode == "online":
            raise TimeoutError("the run was not made in time")
        return Run()

    start(None)
    monkeypatch.setattr(tracker, "choose_mode", lambda wanted, note: "online")
    monkeypatch.setattr(tracker, "_start", open_run)
    notes = []
    Tracker(tmp_path, MonitorConfig("online"), {}, notes.append).close(failed=False)
    assert modes == ["online", "offline"]
    (note,) = notes
    assert "not made in time; `wandb sync` can send it later" in note


def test_a_server_that_takes_the_call_and_never_answers_makes_the_run_offline(tmp_path, monkeypatch):
    """With wandb itself, whose failed start holds the run's id until it is torn down."""
    with listening() as port:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setattr(tracker, "_INIT_S", 2.0)
        notes = []
        run = Tracker(tmp_path, MonitorConfig("online"), {}, notes.append)
        run.log("vision", 1, {"loss": 1.0})
        run.close(failed=False)
    assert len(notes) == 1
    assert "wandb is offline: CommError" in notes[0]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


# ---------------------------------------------------------------------------------------------------------------------
# errors and waits


def test_an_error_of_wandb_switches_it_off_with_one_note(tmp_path, start):
    start(Run(log=raise_connection_error))
    notes = []
    failing = Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append)
    failing.log("vision", 1, {"loss": 1.0})
    failing.log("vision", 2, {"loss": 1.0})
    failing.close(failed=True)
    (note,) = notes
    assert "the server went away" in note


@pytest.mark.parametrize("failed", [False, True])
def test_closing_never_waits_for_long(tmp_path, monkeypatch, start, failed):
    """After a failure other ranks wait to hear of it: not a minute."""
    hangs = threading.Event()
    start(Run(finish=lambda exit_code: hangs.wait()))
    monkeypatch.setattr(tracker, "_CLOSE_FAILED_S" if failed else "_CLOSE_S", 0.2)
    monkeypatch.setattr(tracker, "_KILLED_S", 0.2)
    notes = []
    run = Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append)
    began = time.monotonic()
    run.close(failed)
    assert time.monotonic() - began < 2.5  # the other limit is at least 3 s
    (note,) = notes
    assert "did not finish" in note
    hangs.set()


def test_wandb_that_hangs_in_log_holds_up_nobody_and_is_switched_off(tmp_path, monkeypatch, start):
    hangs = threading.Event()
    start(Run(log=lambda figures: hangs.wait()))
    monkeypatch.setattr(tracker, "_CLOSE_FAILED_S", 0.2)
    monkeypatch.setattr(tracker, "_KILLED_S", 0.2)
    notes = []
    run = Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append)
    began = time.monotonic()
    for step in range(tracker._MAX_CALLS + 10):
        run.log("vision", step, {"loss": 1.0})
    run.close(failed=False)  # it is off, so not a minute
    assert time.monotonic() - began < 30
    (note,) = notes
    assert f"has not answered for {tracker._MAX_CALLS} calls" in note
    hangs.set()


def test_wandb_that_hangs_as_it_starts_is_switched_off(tmp_path, monkeypatch, start):
    hangs = threading.Event()
    start(None)
    monkeypatch.setattr(tracker, "_start", lambda *arguments: hangs.wait())
    for limit in ("_OPEN_S", "_CLOSE_FAILED_S", "_KILLED_S"):
        monkeypatch.setattr(tracker, limit, 0.2)
    notes = []
    run = Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append)
    run.log("vision", 1, {"loss": 1.0})
    run.close(failed=False)
    (note,) = notes
    assert "did not start" in note
    hangs.set()


STOPPED = """
import os, signal, sys
from pathlib import Path
from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.training import tracker
tracker._CLOSE_S = 1.0
run = tracker.Tracker(Path(sys.argv[1]), MonitorConfig("offline"), {}, print)
service = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
           if path.read_text().split()[1] == "(wandb-core)" and path.read_text().split()[3] == str(os.getpid())]
os.kill(service[0], signal.SIGSTOP)
for step in range(10):
    run.log("vision", step, {"loss": 1.0})
print(service[0], flush=True)
run.close(failed=False)
"""


@pytest.mark.faults
@pytest.mark.slow
def test_a_stopped_service_of_wandb_holds_up_neither_the_end_nor_the_exit_of_the_process(tmp_path):
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    service = None
    try:
        service = int(process.stdout.readline())
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        if service and os.path.exists(f"/proc/{service}") and process.returncode != 0:
            os.kill(service, signal.SIGKILL)
    assert process.returncode == 0
    assert rest == "wandb is off: it did not finish within 1 s; the figures are in metrics.jsonl\n"


class Answers(BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs to start; `keys` are those it was called with."""

    keys: set[str]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.keys.add(self.headers.get("Authorization", ""))
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "aWQ=", "name": "n", "displayName": "n", "config": "{}", "sweepName": None, "project": project}
        answers = {
            b"upsertBucket": {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}},
            b"RunResumeStatus": {"model": {"bucket": None}},
        }
        data = next((answer for word, answer in answers.items() if word in body), {})
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        """Nothing on the console."""


def test_a_server_that_dies_in_mid_run_costs_neither_time_nor_the_run(tmp_path, monkeypatch, environment):
    """Logged in by netrc, so that the key's way to the server is seen, too."""
    Answers.keys = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    (environment / "netrc").write_text(f"machine 127.0.0.1\n login user\n password {KEY}\n")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(tracker, "_FINISH_S", 1.0)
    notes = []
    try:
        run = Tracker(tmp_path, MonitorConfig("online"), {}, notes.append)
        assert notes == []
        assert run._run.settings.mode == "online"
        assert any(Answers.keys)
    finally:
        server.shutdown()
        server.server_close()
    began = time.monotonic()
    for step in range(20):
        run.log("vision", step, {"loss": 1.0})
    assert time.monotonic() - began < 1
    run.close(failed=False)
    assert time.monotonic() - began < 30
    (note,) = notes
    assert "wandb is off: TimeoutError" in note
    (kept,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert b"loss/vision.loss" in kept.read_bytes()  # for `wandb sync`


# ---------------------------------------------------------------------------------------------------------------------
# what wandb is given


def test_a_second_start_resumes_the_same_run(tmp_path):
    notes = []
    for step in (1, 2):
        run = Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append)
        run.log("vision", step, {"loss": 1.0})
        run.close(failed=False)
        time.sleep(1.1 - time.time() % 1)  # wandb names the folder by the second
    identity = (tmp_path / "wandb_id").read_text().split()
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == [identity[0]] * 2
    assert identity[1:] == ["vision"]
    assert notes == []


def test_a_stage_that_begins_anew_gets_another_run_of_the_same_group(tmp_path, monkeypatch):
    """Else its second attempt's curve would lie over the first one's."""
    import wandb

    begun, notes = [], []

    def init(**settings):
        begun.append(settings)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    first = Tracker(tmp_path, MonitorConfig("offline"), {"seed": 1}, notes.append)
    first.begin_anew("vision")  # it has no curve yet
    first.log("vision", 1, {"loss": 1.0})
    first.close(failed=False)
    second = Tracker(tmp_path, MonitorConfig("offline"), {"seed": 1}, notes.append)
    second.begin_anew("multitask")
    second.log("multitask", 1, {"loss": 1.0})
    second.describe("vision", "parameters", {"trainable": 7})
    second.begin_anew("vision")
    second.begin_anew("multitask")  # not in the new run, so nothing is in its way
    second.log("vision", 1, {"loss": 1.0})
    second.close(failed=False)
    assert notes == []
    ids = [settings["id"] for settings in begun]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids) == 3
    assert {settings["group"] for settings in begun} == {tmp_path.name}
    assert begun[2]["config"] == {"seed": 1, "vision.parameters": {"trainable": 7}}
    assert (tmp_path / "wandb_id").read_text().split() == [ids[2], "vision"]


def test_pictures_and_frames_reach_wandb_with_both_kinds_of_boxes(tmp_path, environment):
    """Boxes belong to stills; a clip's frames lie side by side."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    frames = np.concatenate([picture, picture[::-1]], axis=1)
    boxes = (Box((0.1, 0.2, 0.5, 0.6), "true", False), Box((0.2, 0.3, 0.6, 0.7), "predicted", True))
    notes = []
    run = Tracker(tmp_path, MonitorConfig("offline"), {}, notes.append)
    still = Shown("referring", "web/7", picture, "where is it?", "there", "here", False, boxes)
    run.show("vision", [still, Shown("clips", "web/8", frames, "what happens?", "it falls", "it falls", True)])
    run.close(failed=False)
    staged = [path for path in (environment / "WANDB_DATA_DIR" / "artifacts" / "staging").iterdir() if path.is_file()]
    pictures = [np.asarray(Image.open(path)) for path in staged if path.read_bytes().startswith(b"\x89PNG")]
    tables = [json.loads(path.read_text()) for path in staged if path.read_bytes().startswith(b'{"_type": "table"')]
    by_width = {shown.shape[1]: shown for shown in pictures}
    assert (by_width[40] == picture).all()
    assert (by_width[80] == frames).all()
    (rows,) = {json.dumps(table["data"]): table["data"] for table in tables}.values()
    images = [row.pop(2) for row in rows]
    assert rows == [
        ["referring", "web/7", "where is it?", "there", "here", False],
        ["clips", "web/8", "what happens?", "it falls", "it falls", True],
    ]
    assert [(image["width"], image["height"]) for image in images] == [(40, 30), (80, 30)]
    assert images[0]["boxes"] == {
        "truth": [
            {"position": {"minX": 0.1, "minY": 0.2, "maxX": 0.5, "maxY": 0.6}, "class_id": 0, "box_caption": "true"}
        ],
        "prediction": [
            {
                "position": {"minX": 0.2, "minY": 0.3, "maxX": 0.6, "maxY": 0.7},
                "class_id": 1,
                "box_caption": "predicted",
            }
        ],
    }
    assert "boxes" not in images[1]
    assert notes == []
