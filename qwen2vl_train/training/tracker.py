"""wandb behind a fence: the same figures as `metrics.jsonl`, and nothing that wandb does can slow or stop a run.

Online only with an API key in the environment or netrc and a server that answers; else offline. Never a prompt. An
error on the way online means offline, any later error of wandb switches it off with a note; closing it waits a bounded
time, after a failure a few seconds, since other ranks wait to hear of it.
"""

from __future__ import annotations

import netrc
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qwen2vl_train.config import MonitorConfig
from qwen2vl_train.sections import SECTIONS, section_of
from qwen2vl_train.training.shown import Box, Shown

Mode = Literal["online", "offline", "disabled"]

_PROBE_S = 3.0
_INIT_S = 30.0
_CLOSE_S, _CLOSE_FAILED_S = 60.0, 3.0
_SERVER = "https://api.wandb.ai"


class Tracker:
    """A wandb run that may be off. `note` prints for people."""

    def __init__(
        self, run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._note = note
        self._stages: set[str] = set()
        self._run: Any = None
        mode = choose_mode(config.wandb, note)
        if mode == "online":
            try:
                self._run = _start(run_dir, config, settings, mode)
            except Exception as error:  # refused, or no answer in time
                note(f"wandb is offline: {type(error).__name__}: {error}; `wandb sync` can send it later")
                self._run = self._guarded(lambda: _start_again(run_dir, config, settings))
        elif mode == "offline":
            self._run = self._guarded(lambda: _start(run_dir, config, settings, mode))

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record figures of `step` in their sections, against the stage's own count of steps."""
        if self._run is None:
            return
        axis = f"steps/{stage}"
        if stage not in self._stages:
            self._stages.add(stage)
            self._guarded(lambda: self._define_axis(stage, axis))
        named = {f"{section_of(name)}/{stage}.{name}": value for name, value in metrics.items() if value is not None}
        self._guarded(lambda: self._run and self._run.log(named | {axis: step}))

    def _define_axis(self, stage: str, axis: str) -> None:
        for section in SECTIONS:
            self._run.define_metric(f"{section}/{stage}.*", step_metric=axis)

    def describe(self, stage: str, name: str, facts: Mapping[str, Any]) -> None:
        """Keep `facts` of a stage beside the run's settings."""
        if self._run is not None:
            self._guarded(lambda: self._run.config.update({f"{stage}.{name}": dict(facts)}, allow_val_change=True))

    def show(self, stage: str, samples: Sequence[Shown]) -> None:
        """A table of held-out pictures with true and predicted text and boxes."""
        if self._run is not None and samples:
            self._guarded(lambda: self._run.log({f"evaluation/{stage}.samples": _table(samples)}))

    def close(self, failed: bool) -> None:
        """Finish the run; what wandb cannot send in time stays in the run's folder (`wandb sync` sends it)."""
        run, self._run = self._run, None
        if run is None:
            return
        closing = threading.Thread(target=lambda: self._guarded(lambda: run.finish(exit_code=int(failed))), daemon=True)
        closing.start()
        limit_s = _CLOSE_FAILED_S if failed else _CLOSE_S
        closing.join(limit_s)
        if closing.is_alive():
            self._note(f"wandb did not finish within {limit_s:.0f} s; `wandb sync` can send the run's folder later")

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """The call's result; wandb raises many kinds of errors, and watching must never cost the run."""
        try:
            return call()
        except Exception as error:
            self._run = None
            self._note(f"wandb is off: {type(error).__name__}: {error}; the figures are in metrics.jsonl")
            return None


def choose_mode(wanted: str, note: Callable[[str], None]) -> Mode:
    """The mode for wandb: "auto" is online with a login; online becomes offline when its server does not answer."""
    if wanted == "auto":  # the user's environment decides before the login does
        wanted = os.environ.get("WANDB_MODE", wanted)
    if wanted == "disabled":
        return "disabled"
    if wanted == "offline":
        return "offline"
    if wanted == "auto" and not _has_login():
        return "offline"
    server = os.environ.get("WANDB_BASE_URL", _SERVER)
    address = urlsplit(_proxy_of(server) or server)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), _PROBE_S).close()
    except OSError as error:
        note(f"wandb is offline, {address.hostname}:{port} does not answer ({error}); `wandb sync` can send it later")
        return "offline"
    return "online"


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for `url`, on many clusters the only way out."""
    address = urlsplit(url)
    if proxy_bypass(address.hostname or ""):
        return None
    proxy = getproxies().get(address.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _start(run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], mode: Mode) -> Any:
    import wandb

    identity = run_dir / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=config.project,
        name=run_dir.name,
        id=identity.read_text(),
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        config=dict(settings),
        settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_S, x_disable_stats=mode == "offline"),
    )


def _start_again(run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any]) -> Any:
    """Offline, after a start online failed: its service process still holds the run's id, and goes first."""
    import wandb

    wandb.teardown()
    return _start(run_dir, config, settings, "offline")


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
