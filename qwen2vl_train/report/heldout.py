"""The section of held-out figures: each task's score after each stage against a constant answer.

Enters: the stages' shares by metric. Leaves: a dot plot (one row per metric, one dot per stage, a bar at the majority
baseline) and the same figures as a table. Sizes are in SVG units, about pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen2vl_train.report.figures import metric_title, percent, points
from qwen2vl_train.report.folder import Stage
from qwen2vl_train.report.markup import Html, color_class, element

WIDTH, ROW, TOP, BOTTOM = 560, 40, 10, 26
LEFT, RIGHT = 150, 56  # room for the metrics' names and for the last stage's figure


@dataclass(frozen=True)
class Scores:
    """Shares (0 to 1) by metric: `stages` are (name, colour, shares) in order of the chain, `majority` the baseline."""

    stages: list[tuple[str, int, dict[str, float]]]
    majority: dict[str, float]

    @property
    def metrics(self) -> list[str]:
        """Names in the order in which they were scored."""
        return list(dict.fromkeys(name for _, _, shares in self.stages for name in shares))


def collect_scores(stages: Sequence[Stage]) -> Scores:
    """The stages that were scored; where stages' baselines differ (another template), the last one's counts."""
    scored = [(stage.name, number, stage.held_out) for number, stage in enumerate(stages) if stage.held_out]
    majority = {name: share for stage in stages for name, share in stage.majority.items()}
    return Scores(scored, majority)


def heldout_section(scores: Scores) -> Html | None:
    """Plot and table side by side; None where nothing was scored."""
    if not scores.metrics:
        return None
    return element(
        "section",
        element("h2", "Held-out figures"),
        element(
            "p",
            "Greedy answers on samples that training never saw. The majority baseline is the best score that one "
            "constant answer could reach on the same samples.",
            class_="hint",
        ),
        element("div", _plot(scores), _table(scores), class_="pair"),
        id="held-out",
    )


def _plot(scores: Scores) -> Html:
    height = TOP + ROW * len(scores.metrics) + BOTTOM
    bottom = height - BOTTOM
    marks = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = _x(share)
        marks.append(element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=bottom))
        marks.append(element("text", f"{100 * share:.0f}%", class_="tick", x=x, y=bottom + 16))
    for row, metric in enumerate(scores.metrics):
        marks += _row(scores, metric, TOP + ROW * (row + 0.5))
    label = "Held-out figures per stage and the majority baseline"
    svg = element("svg", marks, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)
    entries = [
        element("li", element("i", class_=color_class("swatch round", color)), f"after {name}")
        for name, color, _ in scores.stages
    ]
    if scores.majority:
        entries.append(element("li", element("i", class_="swatch bar"), "majority baseline"))
    return element("figure", svg, element("ul", entries, class_="legend"), class_="chart")


def _row(scores: Scores, metric: str, y: float) -> list[Html]:
    """A metric's name, the span of its scores, the baseline's bar, a dot per stage, and the last stage's figure."""
    marks = [element("text", metric_title(metric), class_="row-name", x=LEFT - 14, y=y + 4)]
    dots = [(name, color, shares[metric]) for name, color, shares in scores.stages if metric in shares]
    majority = scores.majority.get(metric)
    ends = [share for _, _, share in dots] + ([] if majority is None else [majority])
    marks.append(element("line", class_="span", x1=_x(min(ends)), x2=_x(max(ends)), y1=y, y2=y))
    if majority is not None:
        title = element("title", f"majority baseline: {percent(majority)}")
        marks.append(element("rect", title, class_="majority", x=_x(majority) - 1.5, y=y - 10, width=3, height=20))
    for number, (name, color, share) in enumerate(dots):
        title = element("title", f"{metric_title(metric)} after {name}: {percent(share)}")
        radius = 6.5 if number == len(dots) - 1 else 5
        marks.append(element("circle", title, class_=color_class("score", color), cx=_x(share), cy=y, r=radius))
    marks.append(element("text", percent(dots[-1][2]), class_="row-value", x=WIDTH - RIGHT + 14, y=y + 4))
    return marks


def _x(share: float) -> float:
    return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)


def _table(scores: Scores) -> Html:
    names = [name for name, _, _ in scores.stages]
    head = element(
        "tr",
        element("th", "metric"),
        element("th", "majority", class_="number"),
        [element("th", name, class_="number") for name in names],
        element("th", "gain", class_="number", title="last stage minus majority baseline, percentage points"),
    )
    rows = []
    for metric in scores.metrics:
        shares = [stage_shares.get(metric) for _, _, stage_shares in scores.stages]
        majority = scores.majority.get(metric)
        last = shares[-1]
        gain = None if last is None or majority is None else last - majority
        cells = [element("td", percent(share), class_="number") for share in (majority, *shares)]
        rows.append(
            element(
                "tr", element("td", metric_title(metric)), cells, element("td", points(gain), class_="number strong")
            )
        )
    note = element("p", "gain: last stage over the majority baseline, in percentage points", class_="hint")
    return element("div", element("table", element("thead", head), element("tbody", rows)), note, class_="scroll")
