"""A run's folder as the report sees it, whatever state the run is in.

Enters: the folder of a finished, running or interrupted run. Leaves: a `Run` with one `Stage` per stage of the chain,
in order. What is missing is left out, what is unreadable is named in `Run.faults`: a failed run still has its report.
A stage's result, removed when the stage is trained anew, means that it is finished, however its last figures fared.
Cost: every line of `metrics.jsonl` is parsed once, about 10 µs each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from data_pipelines.errors import MissingFileError
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
    config = _read_mapping(folder / "config.json", faults)
    summary = _read_mapping(folder / "summary.json", faults)
    lines = _read_lines(folder / "metrics.jsonl", faults)
    planned = _mapping(config.get("stages"))
    names = dict.fromkeys([*planned, *(str(line["stage"]) for line in lines)])
    names |= dict.fromkeys(sorted(path.parent.name for path in folder.glob("*/result.json")))
    if not config and not lines and not any((folder / name / "result.json").is_file() for name in names):
        raise MissingFileError(
            f"{folder} holds no config.json, metrics.jsonl or STAGE/result.json: it is no run's folder; "
            "give the run_dir of a run, e.g. runs/demo"
        )
    by_stage: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for line in lines:
        by_stage[str(line["stage"])].append(line)
    stages = [_read_stage(folder, name, _mapping(planned.get(name)), by_stage[name], faults) for name in names]
    chain = tuple(str(name) for name in config.get("chain") or ()) or tuple(names)
    metrics = folder / "metrics.jsonl"
    return Run(
        folder=folder,
        config=config,
        environment=_read_mapping(folder / "environment.json", faults),
        stages=[stage for stage in stages if stage.state != "waiting" or stage.name in chain],
        chain=chain,
        minutes=_number(summary.get("minutes")),
        export=str(summary["export"]) if summary.get("export") else None,
        last_logged=metrics.stat().st_mtime if metrics.is_file() else None,
        faults=faults,
    )


def _read_stage(
    folder: Path, name: str, planned: Mapping[str, Any], lines: list[dict[str, Any]], faults: list[str]
) -> Stage:
    training = sorted((line for line in lines if _is_training(line)), key=lambda line: line["step"])
    evaluations = [(int(line["step"]), shares) for line in lines if (shares := _held_out_of(line))]
    steps, tokens = (_number(planned.get(unit)) for unit in ("steps", "tokens"))  # one of them is the stage's length
    result = _read_mapping(folder / name / "result.json", faults)
    held_out, majority = _shares(result.get("held_out")), _shares(result.get("majority"))
    if not result and evaluations:  # without an evaluation in metrics.jsonl the file is from an earlier start
        scored = _read_mapping(folder / name / "held_out.json", faults)
        held_out, majority = _shares(scored.get("metrics")), _shares(scored.get("baseline"))
    return Stage(
        name=name,
        state="finished" if result else _state_of(training, steps, tokens),
        trained=tuple(str(part) for part in result.get("trained") or planned.get("trainable") or ()),
        planned_steps=int(steps) if steps else None,
        figures=_final_figures(result) if result else _figures_so_far(training),
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


def _final_figures(result: Mapping[str, Any]) -> Figures:
    names = [field.name for field in fields(Figures) if field.name not in ("steps", "skipped")]
    steps = _number(result.get("steps"))
    skipped = {str(reason): int(number) for reason, number in _mapping(result.get("skipped")).items() if number}
    return Figures(
        steps=None if steps is None else int(steps),
        skipped=skipped,
        **{name: _number(result.get(name)) for name in names},
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


def _held_out_of(line: Mapping[str, Any]) -> dict[str, float]:
    return _shares({key.removeprefix("held_out/"): value for key, value in line.items() if key.startswith("held_out/")})


def _read_mapping(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


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
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) and "stage" in line else None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shares(value: object) -> dict[str, float]:
    return {str(name): float(share) for name, share in _mapping(value).items() if is_number(share)}


def _number(value: object) -> float | None:
    return value if is_number(value) else None
