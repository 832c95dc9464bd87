"""The top of the page: headline figures, the table of stages, skipped samples.

Enters: a `Run`. Leaves: sections. Totals are sums over the stages that have figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2vl_train.report.figures import MISSING, amount, count, duration, loss, metric_title, percent
from qwen2vl_train.report.folder import Figures, Run, Stage
from qwen2vl_train.report.heldout import Scores
from qwen2vl_train.report.markup import Content, Html, color_class, element


def headline_section(run: Run, scores: Scores) -> Html:
    """Tiles: the last stage's scores, then what the run cost. Without scores, the costs alone."""
    tiles = [_score_tile(scores, metric) for metric in scores.metrics]
    done = [stage.figures for stage in run.stages if stage.figures.steps]
    tokens, seconds = _total(done, "tokens"), _total(done, "seconds")
    supervised = _total(done, "supervised_tokens")
    capacity = sum(figures.tokens / figures.fill for figures in done if figures.tokens and figures.fill)
    filled = sum(figures.tokens for figures in done if figures.tokens and figures.fill)
    skipped = sum(sum(figures.skipped.values()) for figures in done)
    facts = [
        _tile("tokens", amount(tokens), f"{amount(supervised)} of them supervised"),
        _tile("training time", duration(seconds), "without data preparation and evaluation"),
        _tile("tokens per second", count(tokens / seconds) if tokens and seconds else MISSING, "mean, all ranks"),
        _tile("pack fill", percent(filled / capacity) if capacity else MISSING, "tokens / capacity"),
        _tile("samples skipped", count(skipped), "counted by reason below" if skipped else "none"),
    ]
    if run.minutes is not None:
        facts.insert(1, _tile("whole run", duration(60 * run.minutes), "data, training, evaluation, export"))
    last = f"Held-out, after {scores.stages[-1][0]}" if scores.stages else None
    return element(
        "section",
        [element("h2", last), element("div", tiles, class_="tiles scores")] if last else None,
        element("h2", "Training"),
        element("div", facts, class_="tiles"),
        id="figures",
    )


def _score_tile(scores: Scores, metric: str) -> Html:
    """The last score, and what it grew from: the majority baseline and the first scored stage."""
    shares = [(name, found[metric]) for name, _, found in scores.stages if metric in found]
    notes = [f"majority {percent(scores.majority[metric])}"] if metric in scores.majority else []
    if len(shares) > 1:
        notes.append(f"{shares[0][0]} {percent(shares[0][1])}")
    return _tile(metric_title(metric), percent(shares[-1][1]), " · ".join(notes))


def _tile(name: str, value: str, note: str) -> Html:
    return element("div", element("h3", name), element("p", value), element("small", note), class_="tile")


def _total(done: Sequence[Figures], name: str) -> float | None:
    values = [value for figures in done if (value := getattr(figures, name)) is not None]
    return sum(values) if values else None


def stages_section(run: Run) -> Html:
    """One row per stage, then skipped samples by stage and reason where there are any."""
    names = ("steps", "tokens", "supervised", "loss first → last", "tokens/s", "data wait", "fill", "skipped", "time")
    head = element(
        "tr",
        [element("th", name) for name in ("stage", "trains", "state")],
        [element("th", name, class_="number") for name in names],
    )
    rows = [_stage_row(stage, number) for number, stage in enumerate(run.stages)]
    table = element("div", element("table", element("thead", head), element("tbody", rows)), class_="scroll card")
    return element("section", element("h2", "Stages"), table, _skipped(run.stages), id="stages")


def _stage_row(stage: Stage, number: int) -> Html:
    figures = stage.figures
    parts = [element("span", part, class_="chip") for part in stage.trained]
    losses = [loss(figures.loss_first), " → ", element("b", loss(figures.loss_last))]
    begun = figures.steps is not None
    cells: list[Content] = [
        count(figures.steps) if stage.state == "finished" or not stage.planned_steps else _steps(stage),
        amount(figures.tokens),
        amount(figures.supervised_tokens),
        losses if begun else MISSING,
        count(figures.tokens_per_s),
        percent(figures.data_wait_share),
        percent(figures.fill),
        count(sum(figures.skipped.values())) if begun else MISSING,
        duration(figures.seconds),
    ]
    state = {"evaluating": "trained, not scored"}.get(stage.state, stage.state)
    return element(
        "tr",
        element(
            "td", element("i", class_=color_class("swatch round", number)), element("b", stage.name), class_="name"
        ),
        element("td", parts),
        element("td", element("span", state, class_=f"state {stage.state}")),
        [element("td", cell, class_="number") for cell in cells],
    )


def _steps(stage: Stage) -> str:
    return f"{count(stage.figures.steps or 0)} of {count(stage.planned_steps)}"


def _skipped(stages: Sequence[Stage]) -> Html | None:
    rows = [
        element("tr", element("td", stage.name), element("td", reason), element("td", count(number), class_="number"))
        for stage in stages
        for reason, number in stage.figures.skipped.items()
    ]
    if not rows:
        return None
    head = element("tr", element("th", "stage"), element("th", "reason"), element("th", "samples", class_="number"))
    table = element("table", element("thead", head), element("tbody", rows))
    return element(
        "details",
        element("summary", "Skipped samples by reason"),
        element("p", "The ledger files in each stage's folder name every one.", class_="hint"),
        table,
    )
