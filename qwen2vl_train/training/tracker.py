"""wandb behind a fence: the same figures as `metrics.jsonl`, and nothing that wandb does can slow or stop a run.

One thread makes all calls of wandb, in their order; where it no longer keeps up, wandb is switched off with a note, as
after any error. Online only with an API key and a server that answers; else offline. Never a prompt. Closing waits a
bounded time, after a failure a few seconds, since other ranks wait to hear of it; then wandb's service process is
killed, because wandb would wait for it when this process exits.
"""

from __future__ import annotations

import netrc
import os
import queue
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data_pipelines.whole import write_whole
from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.sections import SECTIONS, section_of
from qwen2vl_train.training.shown import Box, Shown

Mode = Literal["online", "offline", "disabled"]

_PROBE_S = 3.0
_INIT_S = 30.0
_OPEN_S = 120.0  # service process, probe, a start online that fails, then one offline
_FINISH_S = 30.0  # until wandb itself gives up sending
_CLOSE_S, _CLOSE_FAILED_S = 60.0, 3.0
_KILLED_S = 5.0
_MAX_CALLS = 1000  # that wait: figures of 10,000 steps at log_every=10
_PUBLIC = ("api.wandb.ai", "api.forge.coreweave.com")  # two names of one server; releases differ in which they use


class Tracker:
    """A wandb run that may be off. `note` prints for people. Only the start and `close` wait, both a bounded time."""

    def __init__(
        self, run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._run_dir, self._config, self._note = run_dir, config, note
        self._off = _wanted(config.wandb) == "disabled"
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._run: Any = None  # this and the next two belong to the thread
        self._settings = dict(settings)
        self._axes: set[str] = set()
        opened = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(opened,), name="wandb", daemon=True)
        if not self._off:
            self._thread.start()
            if not opened.wait(
                _OPEN_S
            ):  # wandb sets environment variables, which other threads must not read just then
                self._switch_off(f"it did not start within {_OPEN_S:.0f} s")

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record figures of `step` in their sections, against the stage's own count of steps."""
        named = {f"{section_of(name)}/{stage}.{name}": value for name, value in metrics.items() if value is not None}
        self._call(lambda: self._log(stage, named | {f"steps/{stage}": step}))

    def describe(self, stage: str, name: str, facts: Mapping[str, Any]) -> None:
        """Keep `facts` of a stage beside the run's settings."""
        self._call(lambda: self._describe({f"{stage}.{name}": dict(facts)}))

    def show(self, stage: str, samples: Sequence[Shown]) -> None:
        """A table of held-out pictures with true and predicted text and boxes."""
        if samples:
            self._call(lambda: self._run.log({f"evaluation/{stage}.samples": _table(samples)}))

    def begin_anew(self, stage: str) -> None:
        """`stage` starts over; where the run has a curve of it already, another run of the same group takes over."""
        self._call(lambda: self._renew() if stage in _read_identity(self._run_dir)[1:] else None)

    def close(self, failed: bool) -> None:
        """Finish the run in a bounded time; nothing of wandb is left then that this process's exit would wait for."""
        if not self._thread.is_alive():
            return
        limit_s = _CLOSE_FAILED_S if failed or self._off else _CLOSE_S
        self._call(lambda: self._run.finish(exit_code=int(failed)))
        self._calls.put(None)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._switch_off(f"it did not finish within {limit_s:.0f} s")
            _kill_service()
            self._thread.join(_KILLED_S)  # what it waited for has failed; it takes wandb's own wait at exit away

    def _call(self, call: Callable[[], Any]) -> None:
        if self._calls.qsize() >= _MAX_CALLS:
            self._switch_off(f"it has not answered for {_MAX_CALLS} calls")
        if not self._off:
            self._calls.put(call)

    def _switch_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            self._note(f"wandb is off: {why}; the figures are in metrics.jsonl")

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self, opened: threading.Event) -> None:
        self._guarded(self._open)
        opened.set()
        while call := self._calls.get():
            if not self._off:
                self._guarded(call)
        _tear_down()

    def _guarded(self, call: Callable[[], Any]) -> None:
        """Watching must never cost the run, and wandb raises many kinds of errors."""
        try:
            call()
        except Exception as error:
            self._switch_off(f"{type(error).__name__}: {error}")

    def _open(self) -> None:
        mode = choose_mode(self._config.wandb, self._note)
        if mode == "online":
            try:
                self._run = _start(self._run_dir, self._config, self._settings, mode)
                return
            except Exception as error:  # refused, or no answer in time
                if self._off:
                    raise
                self._note(f"wandb is offline: {type(error).__name__}: {error}; `wandb sync` can send it later")
            _tear_down()  # the service process still holds the run's id
        self._run = _start(self._run_dir, self._config, self._settings, "offline")

    def _log(self, stage: str, figures: dict[str, Any]) -> None:
        if stage not in self._axes:
            for section in SECTIONS:
                self._run.define_metric(f"{section}/{stage}.*", step_metric=f"steps/{stage}")
            self._axes.add(stage)
            identity = _read_identity(self._run_dir)
            if identity and stage not in identity[1:]:
                _write_identity(self._run_dir, [*identity, stage])
        self._run.log(figures)

    def _describe(self, facts: dict[str, Any]) -> None:
        self._settings |= facts  # also for the run that may take over
        self._run.config.update(facts, allow_val_change=True)

    def _renew(self) -> None:
        self._run.finish()
        _write_identity(self._run_dir, [])
        self._axes.clear()
        self._open()


def choose_mode(wanted: str, note: Callable[[str], None]) -> Mode:
    """The mode for wandb: online with an API key for its server and an answer from there, if that is wanted."""
    wanted = _wanted(wanted)
    if wanted == "disabled":
        return "disabled"
    if wanted in ("offline", "dryrun"):
        return "offline"
    server = _server()
    if _login(server) is None:
        note(f"wandb is offline, no API key for {urlsplit(server).netloc}: `wandb login`, later `wandb sync`")
        return "offline"
    address = urlsplit(_proxy_of(server) or server)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), _PROBE_S).close()
    except OSError as error:
        note(f"wandb is offline, {address.hostname}:{port} does not answer ({error}); `wandb sync` can send it later")
        return "offline"
    return "online"


def _wanted(setting: str) -> str:
    """What is asked for; "auto" leaves it to the user's environment."""
    return os.environ.get("WANDB_MODE") or setting if setting == "auto" else setting


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for `url`, on many clusters the only way out."""
    address = urlsplit(url)
    if proxy_bypass(address.hostname or ""):
        return None
    proxy = getproxies().get(address.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _server() -> str:
    """The server's address: from the environment, wandb's settings file, or the release's default."""
    if named := os.environ.get("WANDB_BASE_URL"):
        return named
    import wandb

    return str(wandb.setup(_quiet()).settings.base_url)


def _login(server: str) -> dict[str, str] | None:
    """Settings with which wandb logs in to `server` without asking; None where there is no login.

    As wandb looks for it: in the environment, then in netrc under the server's name (earlier releases: without port).
    """
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return {}  # wandb reads it
    if key := os.environ.get("WANDB_API_KEY"):
        return {"api_key": key}
    address = urlsplit(server)
    names = _PUBLIC if address.netloc in _PUBLIC else (address.netloc, address.hostname or "")
    try:
        logins = netrc.netrc(_netrc())
    except (OSError, netrc.NetrcParseError):
        return None
    keys = [login[2] for name in names if (login := logins.authenticators(name)) and login[2]]
    return {"api_key": keys[0]} if keys else None


def _netrc() -> Path:
    """Named, because Python refuses its own default where others may read it, and wandb does not."""
    if named := os.environ.get("NETRC"):
        return Path(named).expanduser()
    usual = Path("~/.netrc").expanduser()
    return usual if usual.exists() else Path("~/_netrc").expanduser()


def _start(run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], mode: Mode) -> Any:
    import wandb

    identity = _read_identity(run_dir)
    if not identity:
        identity = [uuid.uuid4().hex[:8]]
        _write_identity(run_dir, identity)
    wandb.setup(_quiet())  # the run's own settings do not silence wandb's words before and after it
    login = _login(_server()) if mode == "online" else None
    # wandb then writes what it could not send for `wandb sync`; killed, it would not. Early releases do not know it
    patience = {"finish_timeout": _FINISH_S, "finish_timeout_raises": True}
    known = {name: value for name, value in patience.items() if name in wandb.Settings.model_fields}
    return wandb.init(
        project=config.project,
        name=run_dir.name,
        group=run_dir.name,
        id=identity[0],
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        config=dict(settings),
        settings=_quiet(
            console="off", init_timeout=_INIT_S, x_disable_stats=mode == "offline", **known, **(login or {})
        ),
    )


def _quiet(**settings: Any) -> Any:
    import wandb

    return wandb.Settings(silent=True, **settings)


def _tear_down() -> None:
    """End wandb's service process once its runs are done, and its hook that would do so when this process exits."""
    with suppress(Exception, SystemExit):  # it exits with the service's code
        import wandb

        wandb.teardown()


def _kill_service() -> None:
    """Kill wandb's service process: this process's child, whatever it is at (SIGKILL ends stopped ones, too)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            name, _, fields = path.read_text().partition("(")[2].rpartition(")")  # 12 (wandb-core) S PARENT ...
            if name == "wandb-core" and int(fields.split()[1]) == os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)


def _read_identity(run_dir: Path) -> list[str]:
    """The wandb run's id, then each stage that it has a curve of; empty before the first start."""
    path = run_dir / "wandb_id"
    return path.read_text().split() if path.exists() else []


def _write_identity(run_dir: Path, identity: Sequence[str]) -> None:
    write_whole(run_dir / "wandb_id", "\n".join(identity))


def _table(samples: Sequence[Shown]) -> Any:
    import wandb

    table = wandb.Table(columns=["task", "key", "picture", "prompt", "truth", "prediction", "correct"])
    for sample in samples:
        picture = wandb.Image(sample.picture, boxes=_boxes(sample.boxes))
        row = (sample.task, sample.key, picture, sample.prompt, sample.truth, sample.prediction, sample.correct)
        table.add_data(*row)
    return table


def _boxes(boxes: Sequence[Box]) -> dict[str, Any] | None:
    if not boxes:
        return None
    groups: dict[str, Any] = {}
    for name, predicted in (("truth", False), ("prediction", True)):
        data = [
            {
                "position": dict(zip(("minX", "minY", "maxX", "maxY"), box.xyxy, strict=True)),
                "class_id": int(predicted),
                "box_caption": box.caption,
            }
            for box in boxes
            if box.predicted == predicted
        ]
        groups[name] = {"box_data": data, "class_labels": {0: "truth", 1: "prediction"}}
    return groups
