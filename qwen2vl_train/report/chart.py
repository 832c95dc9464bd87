"""A line chart as inline SVG: axes, round ticks, stage bands, legend, and a hover title for each column of the plot.

Enters: curves, the bands (stages) they lie in and a scale. Leaves: a `<figure>`. It needs no script: titles are the
browser's own; the script only repeats them at once beside the chart's name. Sizes are in SVG units, about pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen2vl_train.report.axis import Scale, linear_scale
from qwen2vl_train.report.curve import Curve, Point
from qwen2vl_train.report.figures import count
from qwen2vl_train.report.markup import Html, color_class, element

WIDTH, HEIGHT = 580, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 20, 34
NUM_COLUMNS = 100  # hover targets across the plot, about 5 units wide
_CHAR_WIDTH = 6.2  # of a band's label, to leave it out where it would not fit


@dataclass(frozen=True)
class Band:
    """A stage on the x axis: its steps run from 0 at `start` to `end - start` at `end`."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Chart:
    """What to draw. `value_text` writes a value in titles and legend, `tick_text` one on the y axis."""

    title: str
    unit: str
    curves: Sequence[Curve]
    bands: Sequence[Band]
    scale: Scale
    value_text: Callable[[float], str]
    tick_text: Callable[[float], str]

    def draw(self) -> Html:
        """The chart as a `<figure>` with its caption and legend."""
        plot = _Plot(self)
        note = f"{self.unit} · log scale" if self.scale.logarithmic else self.unit
        caption = element(
            "figcaption",
            element("b", self.title),
            element("span", note, class_="unit"),
            element("output", class_="readout"),
        )
        svg = element(
            "svg",
            plot.bands(),
            plot.y_axis(),
            plot.x_axis(),
            [plot.curve(curve) for curve in self.curves],
            plot.columns(),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_label=f"{self.title}, {note}",
        )
        return element("figure", caption, svg, self._legend(), class_="chart")

    def _legend(self) -> Html:
        """One entry per label with its last value; the lines of a label lie apart where stages part."""
        last = {curve.label: curve for curve in self.curves}
        entries = []
        for label, curve in last.items():
            value = self.value_text(curve.points[-1].y) if curve.points else "not finite"
            swatch = element("i", class_=color_class("swatch", curve.color))
            button = element("button", swatch, label, " ", element("span", value), type="button", data_series=label)
            entries.append(element("li", button))
        lost = sum(len(curve.non_finite) for curve in self.curves)
        if lost:
            entries.append(element("li", f"▼ {count(lost)} value(s) not finite", class_="lost"))
        return element("ul", entries, class_="legend")


class _Plot:
    """Coordinates and marks of one chart."""

    def __init__(self, chart: Chart) -> None:
        self._chart = chart
        self._start = min((band.start for band in chart.bands), default=0.0)
        self._end = max(max((band.end for band in chart.bands), default=1.0), self._start + 1)

    def _x(self, step: float) -> float:
        return LEFT + (step - self._start) / (self._end - self._start) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self._chart.scale(value) * (HEIGHT - TOP - BOTTOM)

    def bands(self) -> list[Html]:
        """Every second stage shaded, each named where its width allows; a lone stage needs neither."""
        marks: list[Html] = []
        if len(self._chart.bands) < 2:
            return marks
        for number, band in enumerate(self._chart.bands):
            left, right = self._x(band.start), self._x(band.end)
            shade = "band odd" if number % 2 else "band"
            size = {"x": left, "y": TOP, "width": right - left, "height": HEIGHT - TOP - BOTTOM}
            marks.append(element("rect", class_=shade, **size))
            if len(band.name) * _CHAR_WIDTH < right - left:
                marks.append(element("text", band.name, class_="band-name", x=(left + right) / 2, y=TOP - 7))
        return marks

    def y_axis(self) -> list[Html]:
        marks = []
        for tick in self._chart.scale.ticks:
            y = self._y(tick)
            marks.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            marks.append(element("text", self._chart.tick_text(tick), class_="tick y", x=LEFT - 7, y=y + 3.5))
        return marks

    def x_axis(self) -> list[Html]:
        """The axis of steps with its ticks."""
        bottom = HEIGHT - BOTTOM
        marks = [element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom)]
        for tick in linear_scale([self._start, self._end], 8).ticks:
            x = self._x(tick)
            if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
                marks.append(element("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
                anchor = "tick last" if x > WIDTH - RIGHT - 14 else "tick"
                marks.append(element("text", count(tick), class_=anchor, x=x, y=bottom + 16))
        word = "step" if len(self._chart.bands) < 2 else "steps of all stages, one after the other"
        marks.append(element("text", word, class_="tick last", x=WIDTH - RIGHT, y=HEIGHT - 4))
        return marks

    def curve(self, curve: Curve) -> list[Html]:
        """The line, the band between each bucket's lowest and highest value, and marks where values were not finite."""
        name, points = curve.label, curve.points
        marks: list[Html] = []
        if curve.thinned and points:
            rim = [(point.x, point.high) for point in points] + [(point.x, point.low) for point in reversed(points)]
            marks.append(
                element("polygon", class_=color_class("range", curve.color), points=self._path(rim), data_series=name)
            )
        if len(points) == 1:
            dot = {"cx": self._x(points[0].x), "cy": self._y(points[0].y), "r": 2.5}
            marks.append(element("circle", class_=color_class("dot", curve.color), data_series=name, **dot))
        elif points:
            path = self._path([(point.x, point.y) for point in points])
            marks.append(element("polyline", class_=color_class("line", curve.color), points=path, data_series=name))
        for x in dict.fromkeys(round(self._x(x)) for x in curve.non_finite):  # one mark where they would cover another
            marks.append(element("path", class_="lost", d=f"M{x} {TOP + 8}l-4 -7h8z", data_series=name))
        return marks

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)

    def columns(self) -> list[Html]:
        """Invisible hover targets, each with the figures of the points nearest to its middle as its title."""
        width = (WIDTH - LEFT - RIGHT) / NUM_COLUMNS
        steps = (self._end - self._start) / NUM_COLUMNS
        nearest: dict[int, dict[str, Point]] = {}
        for curve in self._chart.curves:
            lost = (Point(x, math.nan, math.nan, math.nan) for x in curve.non_finite)
            for point in (*lost, *curve.points):  # a mark is told before the points beside it
                column = min(NUM_COLUMNS - 1, int((point.x - self._start) / steps))
                middle = self._start + (column + 0.5) * steps
                known = nearest.setdefault(column, {}).get(curve.label)
                if known is None or (math.isfinite(known.y) and abs(point.x - middle) < abs(known.x - middle)):
                    nearest[column][curve.label] = point
        return [
            element(
                "rect",
                element("title", self._title(points)),
                class_="hit",
                x=LEFT + column * width,
                y=TOP,
                width=width,
                height=HEIGHT - TOP - BOTTOM,
            )
            for column, points in sorted(nearest.items())
        ]

    def _title(self, points: dict[str, Point]) -> str:
        """The stage and step, then a line per curve: "multitask, step 120" / "loss 1.23"."""
        x = next(iter(points.values())).x
        band = next((band for band in self._chart.bands if band.start <= x <= band.end), None)
        head = f"{band.name}, step {count(x - band.start)}" if band else f"step {count(x)}"
        lines = []
        for label, point in points.items():
            text = self._chart.value_text
            spread = f" ({text(point.low)} to {text(point.high)})" if point.low < point.high else ""
            lines.append(f"{label} {text(point.y) if math.isfinite(point.y) else 'not finite'}{spread}")
        return "\n".join([head, *lines])
