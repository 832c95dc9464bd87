"""The short table that ends a run on the terminal, or in a log.

Enters: `summary.json`. Leaves: printed lines; the last one is the path of `summary.json` alone, for scripts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen2vl_train.report.figures import MISSING, amount, count, loss, percent

LOG_WIDTH = 120  # columns where no terminal says how wide it is; a wider table gets what it needs
Columns = list[tuple[str, list[str]]]  # heading (which may have two lines), then a cell per stage and one for majority


def print_summary(summary_path: Path) -> None:
    """Print each stage's figures, the paths of report and export, and last the path of `summary_path` itself.

    A terminal too narrow for one table gets two: training, then held-out figures.

    Raises:
        FileNotFoundError: there is no such file; the run has not ended.
    """
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    console = Console()
    plain = not console.encoding.lower().startswith("utf")  # a log in ASCII must not break on an arrow
    stages = summary.get("stages") or {}
    names, training, held_out = [*stages, "majority"], _training(stages), _held_out(stages)
    whole = _table(names, training + held_out, plain)
    width = Console(width=10_000).measure(whole).maximum
    if not console.is_terminal:
        console = Console(width=max(LOG_WIDTH, width))
    tables = [whole]
    if width > console.width and held_out:
        tables = [_table(list(stages), training, plain), _table(names, held_out, plain)]
    console.print()
    for table in tables:
        console.print(table)
    if stale := summary.get("stale"):
        _print_line(console, f"stale    {', '.join(stale)}: begun with weights that were trained anew since")
    minutes = summary.get("minutes")
    if minutes is not None:
        _print_line(console, f"minutes  {minutes:.1f}")
    for name in ("report", "export"):
        if summary.get(name):
            _print_line(console, f"{name:<7}  {summary[name]}")
    _print_line(console, str(summary_path.resolve()))


def _print_line(console: Console, text: str) -> None:
    """One line as it is: a path is never wrapped, coloured or read as markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _training(stages: Mapping[str, Mapping[str, Any]]) -> Columns:
    rows = list(stages.values())
    return [
        ("trains", [" ".join(row.get("trained") or ()) for row in rows]),
        ("tokens", [amount(row.get("tokens")) for row in rows]),
        ("loss", [f"{loss(row.get('loss_first'))} → {loss(row.get('loss_last'))}" for row in rows]),
        ("tokens/s", [count(row.get("tokens_per_s")) for row in rows]),
        ("fill", [percent(row.get("fill")) for row in rows]),
    ]


def _held_out(stages: Mapping[str, Mapping[str, Any]]) -> Columns:
    """A column per metric, "caption" over "exact"; its last cell is the majority baseline."""
    rows = list(stages.values())
    metrics = dict.fromkeys(name for row in rows for name in row.get("held_out") or ())
    majority = {name: share for row in rows for name, share in (row.get("majority") or {}).items()}
    return [
        (
            metric.replace("_", "\n"),
            [percent((row.get("held_out") or {}).get(metric)) for row in rows] + [percent(majority.get(metric))],
        )
        for metric in metrics
    ]


def _table(names: list[str], columns: Columns, plain: bool) -> Table:
    """A row per stage; the majority baseline, where `columns` have it, stands apart as the last one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage", overflow="fold")
    for heading, _ in columns:
        justify: Literal["left", "right"] = "left" if heading == "trains" else "right"
        table.add_column(_text(heading, plain), justify=justify, overflow="fold")
    for number, name in enumerate(names):
        cells = [cells[number] if number < len(cells) else "" for _, cells in columns]
        if name == names[-1] == "majority":
            if not any(cells):
                continue
            table.add_section()
        table.add_row(*(_text(cell, plain) for cell in (name, *cells)))
    return table


def _text(text: str, plain: bool) -> Text:
    """Text as it is: a stage called "[b]" is no markup."""
    return Text(text.replace("→", "->").replace(MISSING, "-") if plain else text)
