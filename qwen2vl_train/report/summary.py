"""The short table that ends a run on the terminal, or in a log.

Enters: `summary.json`. Leaves: printed lines; the last one is the path of `summary.json` alone, for scripts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen2vl_train.report.document import Document
from qwen2vl_train.report.figures import MISSING, amount, count, loss, percent

LOG_WIDTH = 120  # columns where no terminal says how wide it is; a wider table gets what it needs
Columns = list[tuple[str, list[str]]]  # heading (which may have two lines), then a cell per stage and one for majority


def print_summary(summary_path: Path) -> None:
    """Print each stage's figures, the paths of report and export, and last the path of `summary_path` itself.

    A terminal too narrow for one table gets two: training, then held-out figures.

    Raises:
        FileNotFoundError: there is no such file; the run has not ended.
    """
    faults: list[str] = []
    summary = Document(str(summary_path), json.loads(summary_path.read_text(encoding="utf-8")), faults)
    console = Console()
    plain = not console.encoding.lower().startswith("utf")  # a log in ASCII must not break on an arrow
    stages = summary.inner("stages")
    rows = [stages.inner(name) for name in stages.values]
    names, training, held_out = [*stages.values, "majority"], _training(rows), _held_out(rows)
    whole = _table(names, training + held_out, plain)
    width = Console(width=10_000).measure(whole).maximum
    if not console.is_terminal:
        console = Console(width=max(LOG_WIDTH, width))
    tables = [whole]
    if width > console.width and held_out:
        tables = [_table(names[:-1], training, plain), _table(names, held_out, plain)]
    console.print()
    for table in tables:
        console.print(table)
    if stale := summary.texts("stale"):
        _print_line(console, f"stale    {', '.join(stale)}: begun with weights that were trained anew since")
    minutes = summary.number("minutes")
    if minutes is not None:
        _print_line(console, f"minutes  {minutes:.1f}")
    for name in ("report", "export"):
        if path := summary.text(name):
            _print_line(console, f"{name:<7}  {path}")
    for fault in faults:
        _print_line(console, f"left out {fault}")
    _print_line(console, str(summary_path.resolve()))


def _print_line(console: Console, text: str) -> None:
    """One line as it is: a path is never wrapped, coloured or read as markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _training(rows: Sequence[Document]) -> Columns:
    losses = [(row.number("loss_first"), row.number("loss_last")) for row in rows]
    return [
        ("trains", [" ".join(row.texts("trained")) for row in rows]),
        ("tokens", [amount(row.number("tokens")) for row in rows]),
        ("loss", [f"{loss(first)} → {loss(last)}" for first, last in losses]),
        ("tokens/s", [count(row.number("tokens_per_s")) for row in rows]),
        ("fill", [percent(row.number("fill")) for row in rows]),
    ]


def _held_out(rows: Sequence[Document]) -> Columns:
    """A column per metric, "caption" over "exact"; its last cell is the majority baseline."""
    scores = [row.numbers("held_out") for row in rows]
    metrics = dict.fromkeys(name for shares in scores for name in shares)
    majority = {name: share for row in rows for name, share in row.numbers("majority").items()}
    return [
        (
            metric.replace("_", "\n"),
            [percent(shares.get(metric)) for shares in scores] + [percent(majority.get(metric))],
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
