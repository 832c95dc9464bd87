"""The section of curves: which charts a run gets, for the whole chain and for each stage alone.

Enters: the stages' metric lines. Leaves: one view of charts per stage and one of all, of which the page shows one at a
time. A figure that this file does not know still gets a chart, so that a new metric is not lost on the way to people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl_train.report.axis import Scale, linear_scale, loss_scale
from qwen2vl_train.report.chart import Band, Chart
from qwen2vl_train.report.curve import MAX_POINTS, make_curve
from qwen2vl_train.report.figures import amount, count, is_number, loss, metric_title, percent
from qwen2vl_train.report.folder import Stage
from qwen2vl_train.report.markup import NUM_COLORS, Html, element
from qwen2vl_train.sections import SECTIONS, section_of

Series = dict[str, list[tuple[float, float]]]  # label → (step, value), in order of steps


@dataclass(frozen=True)
class _Wanted:
    """A chart: the metric `key`, or every metric under it where it ends in "/"; how its values read and scale."""

    key: str
    title: str
    unit: str
    scale: Callable[[Sequence[float]], Scale]
    text: Callable[[float], str] = amount
    tick: Callable[[float], str] = amount


def _from_zero(values: Sequence[float]) -> Scale:
    return linear_scale(values, zero=True)


def _share(values: Sequence[float]) -> Scale:
    return linear_scale([*values, 0.01], zero=True, top=1.0)


def _full(values: Sequence[float]) -> Scale:
    return linear_scale([*values, 1.0], top=1.0)


def _whole(values: Sequence[float]) -> Scale:
    return linear_scale(values, min(5, max(1, int(max(values, default=1)))), zero=True)  # no half samples


def _tick_percent(value: float) -> str:
    return f"{100 * value:.3g}%"


_NATS = "nats per supervised token"
_CHARTS = (
    _Wanted("loss", "Loss", _NATS, loss_scale, loss),
    _Wanted("loss/", "Loss per dataset", _NATS, loss_scale, loss),
    _Wanted("held_out/", "Held-out figures", "share right", _share, percent, _tick_percent),
    _Wanted("gradient_norm", "Gradient norm", "L2 before clipping", loss_scale),
    _Wanted("lr/", "Learning rates", "per parameter group", _from_zero),
    _Wanted("skipped_updates", "Skipped updates", "not finite, since the stage's start", _whole, count, count),
    _Wanted("rollbacks", "Rollbacks", "after loss spikes, since the stage's start", _whole, count, count),
    _Wanted("tokens_per_s", "Tokens per second", "all ranks", _from_zero),
    _Wanted("samples_per_s", "Samples per second", "all ranks", _from_zero),
    _Wanted("mfu", "MFU", "share of the peak, data wait included", _share, percent, _tick_percent),
    _Wanted("tflops_per_s", "TFLOP/s", "the model's own, all ranks", _from_zero),
    _Wanted("data_wait_share", "Data wait", "share of the step's time", _share, percent, _tick_percent),
    _Wanted("memory_gb", "Memory", "GB, the rank that takes most", _from_zero),
    _Wanted("fill", "Pack fill", "tokens / capacity", _full, percent, _tick_percent),
    _Wanted("mixture/", "Mixture", "share of samples, got and wanted", _share, percent, _tick_percent),
    _Wanted("vision_share", "Vision tokens", "share of all tokens", _share, percent, _tick_percent),
    _Wanted("documents/", "Samples trained", "per dataset, since the stage's start", _from_zero, count),
    _Wanted("skipped", "Skipped samples", "since the stage's start", _whole, count, count),
    _Wanted("skipped/", "Skipped samples by reason", "since the stage's start", _whole, count, count),
)
_UNLESS_NONE = frozenset({"skipped", "skipped_updates", "rollbacks"})  # no chart of nothing but zeros
_IN_TABLES = frozenset({"stage", "step", "step_s", "tokens", "supervised_tokens"})  # no chart: tables show them


def curves_section(stages: Sequence[Stage]) -> Html | None:
    """The charts with buttons to choose a view; None where nothing is logged yet."""
    begun = [(stage, _columns(stage.lines)) for stage in stages if stage.lines]
    if not begun:
        return None
    colors = _Colors([stage.name for stage in stages])
    views = [("all stages", _view(begun, colors))] if len(begun) > 1 else []
    views += [(stage.name, _view([(stage, columns)], colors)) for stage, columns in begun]
    buttons = [
        element("button", name, type="button", data_view=name, aria_pressed="false" if number else "true")
        for number, (name, _) in enumerate(views)
    ]
    num_lines = sum(len(stage.lines) for stage, _ in begun)
    note = f"{count(num_lines)} logged lines."
    if any(len(stage.lines) > MAX_POINTS for stage, _ in begun):
        note += (
            f" A chart has about {MAX_POINTS} points across: a longer curve is drawn as means of neighbouring values, "
            "and the pale band spans their lowest and highest, so spikes stay visible."
        )
    return element(
        "section",
        element("h2", "Curves"),
        element("p", note, " Hover for figures; a legend's entry switches its line off and on.", class_="hint"),
        element("div", element("span", "stage"), buttons, class_="choices") if len(views) > 1 else None,
        [
            element("div", charts, class_="charts", data_view=name, hidden=number > 0)
            for number, (name, charts) in enumerate(views)
        ],
        id="curves",
    )


class _Colors:
    """One colour per stage on the whole page, by its place in the chain; in other charts, by first appearance.

    "text.wanted" has the colour of "text", dashed.
    """

    def __init__(self, stages: Sequence[str]) -> None:
        self._numbers = {("", name): number for number, name in enumerate(stages)}

    def __call__(self, key: str, label: str) -> int:
        kind = key if key.endswith("/") else ""
        name = label.removesuffix(".wanted")
        used = sum(known == kind for known, _ in self._numbers)
        number = self._numbers.setdefault((kind, name), used)
        return number if name == label else number % NUM_COLORS + NUM_COLORS


def _view(stages: Sequence[tuple[Stage, Series]], colors: _Colors) -> list[Html]:
    """All charts over `stages` (each with its columns), one after the other on the x axis; in wandb's sections."""
    bands: list[Band] = []
    end = 0.0
    for stage, _ in stages:
        steps = max(1, stage.lines[-1]["step"], *(step for step, _ in stage.evaluations))
        bands.append(Band(stage.name, end, end + steps))
        end += steps
    sections: dict[str, list[Html]] = {}
    for wanted in (*_CHARTS, *_unknown([columns for _, columns in stages])):
        curves = []
        for (stage, columns), band in zip(stages, bands, strict=True):
            # The width's points are shared out, or a short stage's line beside a long one's is a blot of ink.
            most = max(20, round(MAX_POINTS * (band.end - band.start) / end))
            for label, values in _series(wanted, stage, columns).items():
                placed = [(band.start + step, value) for step, value in values]
                curves.append(make_curve(label, colors(wanted.key, label), placed, most))
        heights = [height for curve in curves for point in curve.points for height in (point.low, point.high)]
        if not curves or (wanted.key in _UNLESS_NONE and not any(heights)):
            continue
        chart = Chart(wanted.title, wanted.unit, curves, bands, wanted.scale(heights), wanted.text, wanted.tick)
        sections.setdefault(section_of(wanted.key), []).append(chart.draw())
    return [
        part
        for section in SECTIONS
        if section in sections
        for part in (element("h3", section.capitalize()), *sections[section])
    ]


def _columns(lines: Sequence[Mapping[str, Any]]) -> Series:
    """(step, value) of each line by figure; null, which the monitor writes for NaN and infinities, is NaN again.

    The chart marks these.
    """
    columns: Series = {}
    for line in lines:
        step = line["step"]
        for key, value in line.items():
            if key not in _IN_TABLES and (value is None or type(value) in (int, float)):
                columns.setdefault(key, []).append((step, float(value) if is_number(value) else math.nan))
    return columns


def _series(wanted: _Wanted, stage: Stage, columns: Series) -> Series:
    """What the chart shows of a stage: one series named like the stage, or one per metric under the key."""
    if wanted.key == "held_out/":
        return _held_out_series(stage)
    if wanted.key.endswith("/"):
        series = {key.removeprefix(wanted.key): column for key, column in columns.items() if key.startswith(wanted.key)}
        return rates_by_part(series) if wanted.key == "lr/" else series
    return {stage.name: columns[wanted.key]} if wanted.key in columns else {}


def _held_out_series(stage: Stage) -> Series:
    """Scores over steps, where a stage was scored more than once; a single score stands in the section above."""
    if len(stage.evaluations) < 2:
        return {}
    names = dict.fromkeys(name for _, shares in stage.evaluations for name in shares)
    return {
        metric_title(name): [(step, shares[name]) for step, shares in stage.evaluations if name in shares]
        for name in names
    }


def rates_by_part(series: Series) -> Series:
    """One line per rate: decayed and undecayed groups share one, and of a ViT's layers the first and last suffice.

    {"vit.0", "vit.0.no_decay", "vit.1", ..., "vit.32", "llm"} → {"vit layer 0", "vit layer 32", "llm"}; parts that
    train at the same rate share a line, "vit, merger", where one would hide the other.
    """
    rates = {name.removesuffix(".no_decay"): values for name, values in series.items()}
    layers: dict[str, list[int]] = {}
    for name in rates:
        if match := re.fullmatch(r"(.+)\.(\d+)", name):
            layers.setdefault(match[1], []).append(int(match[2]))
    for part, numbers in layers.items():
        ends = {min(numbers), max(numbers)}
        chosen = {f"{part} layer {number}": rates[f"{part}.{number}"] for number in sorted(ends)}
        rates = {name: values for name, values in rates.items() if not re.fullmatch(rf"{re.escape(part)}\.\d+", name)}
        rates = chosen | rates
    names_by_rates: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, values in rates.items():
        names_by_rates.setdefault(tuple(values), []).append(name)
    return {", ".join(names): list(values) for values, names in names_by_rates.items()}


def _unknown(stages: Sequence[Series]) -> Iterator[_Wanted]:
    """A plain chart for each figure, or group of figures before a "/", that has none above."""
    known = {wanted.key for wanted in _CHARTS}
    keys = dict.fromkeys(key for columns in stages for key in columns)
    groups = dict.fromkeys(f"{key.split('/')[0]}/" if "/" in key else key for key in keys)
    for group in groups:
        if group not in known:
            yield _Wanted(group, metric_title(group.removesuffix("/")), "as logged", linear_scale)
