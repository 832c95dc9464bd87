"""What a person watches: one line of JSON per log, the same figures in wandb, a progress bar on a terminal.

Only rank 0 has a live monitor; the others hold a silent one, so the trainer calls it unconditionally. wandb goes online
only with an API key in the environment or netrc; it never prompts and its failure never stops a run.
"""

from __future__ import annotations

import json
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen2vl_train.config import MonitorConfig


@dataclass(frozen=True)
class Box:
    """A box to draw on a picture: fractions of its size (0 to 1), a caption, and whether it is the prediction."""

    xyxy: tuple[float, float, float, float]
    caption: str
    predicted: bool


@dataclass(frozen=True)
class Shown:
    """One held-out picture for the table: RGB array uint8 [H, W, 3], prompt, truth and prediction, boxes of both."""

    task: str
    key: str
    picture: Any
    prompt: str
    truth: str
    prediction: str
    correct: bool
    boxes: tuple[Box, ...] = field(default_factory=tuple)


class Monitor:
    """Writes `metrics.jsonl` in the run's folder, wandb, and the console. `active=False` makes every call silent."""

    def __init__(self, run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], active: bool) -> None:
        self.console = Console(quiet=not active)
        self._path = run_dir / "metrics.jsonl"
        self._progress: Progress | None = None
        self._task: Any = None
        self._wandb: Any = _start_wandb(run_dir, config, settings, self.console) if active else None
        self._active = active

    def log(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record figures of `step` (0-based count of finished updates) under the stage's name."""
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step})

    def forget_after(self, stage: str, step: int) -> None:
        """Drop logged lines of `stage` later than `step`: the resumed run will write them again."""
        if not self._active or not self._path.exists():
            return
        lines = [json.loads(line) for line in self._path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def show(self, stage: str, samples: Sequence[Shown]) -> None:
        """A wandb table of held-out pictures with true and predicted text and boxes."""
        if self._wandb is None or not samples:
            return
        import wandb

        table = wandb.Table(columns=["task", "key", "picture", "prompt", "truth", "prediction", "correct"])
        for sample in samples:
            picture = wandb.Image(sample.picture, boxes=_wandb_boxes(sample.boxes))
            table.add_data(
                sample.task, sample.key, picture, sample.prompt, sample.truth, sample.prediction, sample.correct
            )
        self._wandb.log({f"{stage}/held_out_samples": table})

    def start_progress(self, description: str, total: int, done: int = 0) -> None:
        """Open a progress bar (on a terminal only) of `total` steps."""
        self.stop_progress()
        if self._active and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            tail = (TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._progress = Progress(*columns, *tail, console=self.console)
            self._task = self._progress.add_task(description, total=total, completed=done, note="")
            self._progress.start()

    def advance(self, done: int, note: str = "") -> None:
        """Set the progress bar to `done` steps with a short note beside it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)

    def stop_progress(self) -> None:
        """Close the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Finish the wandb run and the progress bar."""
        self.stop_progress()
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _start_wandb(run_dir: Path, config: MonitorConfig, settings: Mapping[str, Any], console: Console) -> Any:
    mode = ("online" if _has_wandb_login() else "offline") if config.wandb == "auto" else config.wandb
    if mode == "disabled":
        return None
    import wandb

    identity = run_dir / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=config.project,
            name=run_dir.name,
            id=identity.read_text(),
            resume="allow",
            mode=mode,
            dir=str(run_dir),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, x_disable_stats=mode == "offline"),
        )
    except Exception as error:  # wandb raises many kinds; watching must never cost the run
        console.print(f"[yellow]wandb is off: {error}; the figures are in metrics.jsonl[/yellow]")
        return None
    return run


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_boxes(boxes: Sequence[Box]) -> dict[str, Any] | None:
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
