"""A run's folder as the report sees it, whatever state the run is in.

Enters: the folder of a finished, running or interrupted run. Leaves: a `Run` with one `Stage` per stage of the chain,
in order. What is missing is left out, what is unreadable is named in `Run.faults`: a failed run still has its report.
A stage's result, removed when the stage is trained anew, means that it is finished, however its last figures fared.
Cost: every line of `metrics.jsonl` is parsed once, about 10 µs each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data_pipelines.errors import MissingFileError
from qwen2vl_train.report.document import Document, read_document
from qwen2vl_train.report.figures import is_number

State = Literal["finished", "evaluating", "unfinished", "waiting"]


@dataclass(frozen=True)
class Figures:
    """What a stage has done so far; None where nothing is known.

    `tokens_per_s` and `fill` (tokens / capacity of the packs) are means over the stage, `data_wait_share` is the part
    of `seconds` spent waiting for packs, `skipped` counts samples by reason. Losses are in nats per supervised token.
    """

    steps: int | None = None
    tokens: float | None = None
    supervised_tokens: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    tokens_per_s: float | None = None
    fill: float | None = None
    data_wait_share: float | None = None
    seconds: float | None = None
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage: `lines` are its training figures in order of steps, `held_out` and `majority` shares from 0 to 1.

    `evaluations` are (step, shares by metric), in order. `state`: "finished" has a result; "evaluating" has trained its
    whole length but left no result; "unfinished" has some figures; "waiting" has none.
    """

    name: str
    state: State
    trained: tuple[str, ...]
    planned_steps: int | None
    figures: Figures
    lines: list[dict[str, Any]]
    evaluations: list[tuple[int, dict[str, float]]]
    held_out: dict[str, float]
    majority: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run's folder. `chain` names the stages that the run's last start was to complete; `faults` is for people."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    stages: list[Stage]
    chain: tuple[str, ...]
    minutes: float | None
    export: str | None
    last_logged: float | None
    faults: list[str]

    @property
    def finished(self) -> bool:
        """Every stage of the chain has left its result."""
        done = {stage.name for stage in self.stages if stage.state == "finished"}
        return bool(done) and set(self.chain) <= done


def read_run(folder: Path) -> Run:
    """Read whatever a run has left in `folder` so far.

    Raises:
        FileNotFoundError: the folder is absent, or nothing in it comes from a run (a report of nothing would mislead).
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is no folder; give the run_dir of a run, e.g. runs/demo")
    faults: list[str] = []
    config = read_document(folder / "config.json", faults)
    summary = read_document(folder / "summary.json", faults)
    lines = _read_lines(folder / "metrics.jsonl", faults)
    planned = config.inner("stages")
    names = dict.fromkeys([*planned.values, *(str(line["stage"]) for line in lines)])
    names |= dict.fromkeys(sorted(path.parent.name for path in folder.glob("*/result.json")))
    if not config.values and not lines and not any((folder / name / "result.json").is_file() for name in names):
        raise MissingFileError(
            f"{folder} holds no config.json, metrics.jsonl or STAGE/result.json: it is no run's folder; "
            "give the run_dir of a run, e.g. runs/demo"
        )
    by_stage: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for line in lines:
        by_stage[str(line["stage"])].append(line)
    stages = [_read_stage(folder, name, planned.inner(name), by_stage[name], faults) for name in names]
    chain = config.texts("chain") or tuple(names)
    metrics = folder / "metrics.jsonl"
    return Run(
        folder=folder,
        config=dict(config.values),
        environment=dict(read_document(folder / "environment.json", faults).values),
        stages=[stage for stage in stages if stage.state != "waiting" or stage.name in chain],
        chain=chain,
        minutes=summary.number("minutes"),
        export=summary.text("export"),
        last_logged=metrics.stat().st_mtime if metrics.is_file() else None,
        faults=faults,
    )


def _read_stage(folder: Path, name: str, planned: Document, lines: list[dict[str, Any]], faults: list[str]) -> Stage:
    training = sorted((line for line in lines if _is_training(line)), key=lambda line: line["step"])
    evaluations = [(int(line["step"]), shares) for line in lines if (shares := _held_out_of(line))]
    steps, tokens = planned.number("steps"), planned.number("tokens")  # one of them is the stage's length
    result = read_document(folder / name / "result.json", faults)
    done = bool(result.values)
    held_out, majority = result.numbers("held_out"), result.numbers("majority")
    if not done and evaluations:  # without an evaluation in metrics.jsonl the file is from an earlier start
        scored = read_document(folder / name / "held_out.json", faults)
        held_out, majority = scored.numbers("metrics"), scored.numbers("baseline")
    return Stage(
        name=name,
        state="finished" if done else _state_of(training, steps, tokens),
        trained=result.texts("trained") or planned.texts("trainable"),
        planned_steps=int(steps) if steps else None,
        figures=_final_figures(result) if done else _figures_so_far(training),
        lines=training,
        evaluations=evaluations,
        held_out=held_out or (evaluations[-1][1] if evaluations else {}),
        majority=majority,
    )


def _state_of(training: list[dict[str, Any]], steps: float | None, tokens: float | None) -> State:
    """Of a stage without a result; its length is `tokens` or else `steps`."""
    if not training:
        return "waiting"
    last = training[-1]
    done = (_number(last.get("tokens")) or 0) >= tokens if tokens else steps is not None and last["step"] >= steps
    return "evaluating" if done else "unfinished"


def _is_training(line: dict[str, Any]) -> bool:
    """A line of a window of steps (one without labels has no loss); the others hold scores, or nothing scored."""
    return len(line) > 2 and not any(key.startswith("held_out/") for key in line)  # more than stage and step


def _final_figures(result: Document) -> Figures:
    names = [field.name for field in fields(Figures) if field.name not in ("steps", "skipped")]
    steps = result.number("steps")
    return Figures(
        steps=None if steps is None else int(steps),
        skipped={reason: int(number) for reason, number in result.numbers("skipped").items() if number},
        **{name: result.number(name) for name in names},
    )


def _figures_so_far(lines: list[dict[str, Any]]) -> Figures:
    """The stage's figures from its lines: each covers the tokens since the line before.

    Two windows of 100 tokens at 50 and 100 tokens/s: 200 tokens in 2 + 1 s, 66.7 tokens/s.
    """
    if not lines:
        return Figures()
    before, tokens, seconds, waited, capacity = 0.0, 0.0, 0.0, 0.0, 0.0
    for line in lines:
        total = _number(line.get("tokens")) or 0.0
        window, before = total - before, total
        speed, fill = _number(line.get("tokens_per_s")), _number(line.get("fill"))
        if window <= 0 or not speed or not fill:
            continue  # a line without these figures, or of a rank that read nothing
        tokens += window
        seconds += window / speed
        waited += window / speed * (_number(line.get("data_wait_share")) or 0.0)
        capacity += window / fill
    losses = [number for line in lines if (number := _number(line.get("loss"))) is not None]
    skipped = int(_number(lines[-1].get("skipped")) or 0)
    return Figures(
        steps=int(lines[-1]["step"]),
        tokens=_number(lines[-1].get("tokens")),
        supervised_tokens=_number(lines[-1].get("supervised_tokens")),
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        tokens_per_s=tokens / seconds if seconds else None,
        fill=tokens / capacity if capacity else None,
        data_wait_share=waited / seconds if seconds else None,
        seconds=seconds or None,
        skipped={"reasons follow at the stage's end": skipped} if skipped else {},
    )


def _held_out_of(line: dict[str, Any]) -> dict[str, float]:
    scores = {key.removeprefix("held_out/"): value for key, value in line.items() if key.startswith("held_out/")}
    return {name: float(share) for name, share in scores.items() if is_number(share)}


def _read_lines(path: Path, faults: list[str]) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`; a last one without its end is just being written: not worth a word."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = _parse_line(text)
            if line is not None:
                lines.append(line)
            elif text.endswith("\n"):
                broken += 1
    if broken:
        faults.append(f"{path}: {broken} unreadable line(s) left out")
    return lines


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and "stage" in line and isinstance(line.get("step"), int) and is_number(line["step"])
    return line if whole else None


def _number(value: object) -> float | None:
    return value if is_number(value) else None
