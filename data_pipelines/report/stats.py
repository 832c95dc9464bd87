"""`qwen2vl-data stats SHARDS ...`: what a mixture holds, as tables.

Enters: shards, or a file of settings. Leaves: printed tables of samples and tokens per data set and task, resolutions,
clip durations, the fill of the packs a plan makes of them, and what a run would leave out. Nothing is decoded; the
indices are built where they are missing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipelines.errors import UserError
from data_pipelines.index.source import SourceIndex
from data_pipelines.loader import open_sources
from data_pipelines.plan.planner import Pack
from data_pipelines.report.data_run import DataRun, add_data_options, data_run_of
from data_pipelines.report.indexing import index_progress
from data_pipelines.report.survey import Survey, fills, plan_packs, survey_sources
from data_pipelines.tokenizer import TextTokenizer

PLANNED_PACKS = 1000
NOTHING = "–"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `stats`."""
    parser = commands.add_parser(
        "stats",
        help="sizes, lengths, resolutions, durations and fill of a mixture, as tables",
        description="What shards hold, from their indices: samples and tokens per data set and task, resolutions, clip "
        "durations, how full packs of --max-tokens become, and what a run would leave out.",
        epilog="Examples: qwen2vl-data stats 'shards/*/*.tar' --tokenizer Qwen2-VL-2B-Instruct | "
        "qwen2vl-data stats --config runs/demo --stage multitask",
    )
    add_data_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    settings = data_run_of(options)
    sources = open_run(settings, options.processes)
    survey = survey_sources(sources, settings.data)
    console = Console(highlight=False)
    for table in (*_lengths_tables(survey), *_media_tables(survey)):
        console.print(table)
    packs = plan_packs(sources, settings, survey.num_tokens, PLANNED_PACKS)
    if packs:
        console.print(describe_fill(packs, settings))
    if survey.problems:
        console.print(_problems_table(survey))
    return 0


def open_run(settings: DataRun, processes: int | None) -> list[SourceIndex]:
    """The sources of a run's mixture, indices built with a progress bar.

    Raises:
        UserError: no tokenizer is known, or a pattern names no shard.
    """
    if not settings.tokenizer:
        raise UserError("token counts need a tokenizer: give the folder of one with --tokenizer")
    with index_progress() as progress:
        return open_sources(settings.data, TextTokenizer(settings.tokenizer), processes, progress)


def describe_fill(packs: Sequence[Pack], settings: DataRun) -> str:
    """One line on the packs of the plan: how many, how full, documents in each."""
    full = fills(packs, settings.data)
    documents = np.mean([len(pack.items) for pack in packs])
    plan = settings.data.plan
    return (
        f"Packs of {plan.max_tokens:,} tokens and {plan.max_patches:,} patches ({plan.packing}): {len(packs):,} planned"
        f", mean fill {100 * full.mean():.2f}%, {100 * np.mean(full < 0.98):.1f}% of them under 98%, "
        f"{documents:.1f} documents each"
    )


def _lengths_tables(survey: Survey) -> list[Table]:
    """Shares and lengths, two tables: together they would not fit the 80 columns of a terminal."""
    shares = _table("Samples and tokens", ("data set", "task", "samples", "share", "tokens", "share"), left=2)
    lengths = _table("Tokens of a sample", ("data set", "task", "5%", "median", "95%", "longest"), left=2)
    samples, tokens = max(1, survey.num_samples), max(1, survey.num_tokens)
    before = ""
    for group in survey.groups:
        total, count = int(group.tokens.sum()), len(group.tokens)
        name = "" if group.dataset == before else escape(group.dataset)
        shares.add_row(name, group.task, f"{count:,}", f"{count / samples:.1%}", f"{total:,}", f"{total / tokens:.1%}")
        lengths.add_row(name, group.task, *_spread(group.tokens))
        before = group.dataset
    if len(survey.groups) > 1:
        for table in (shares, lengths):
            table.add_section()
        shares.add_row("all", "", f"{survey.num_samples:,}", "", f"{survey.num_tokens:,}", "")
        lengths.add_row("all", "", *_spread(np.concatenate([group.tokens for group in survey.groups])))
    return [shares, lengths]


def _spread(tokens: npt.NDArray[np.int64]) -> list[str]:
    return [f"{value:,.0f}" for value in np.percentile(tokens, (5, 50, 95, 100))] if len(tokens) else [NOTHING] * 4


def _media_tables(survey: Survey) -> list[Table]:
    """Pictures and clips, each where there are any."""
    pictures = _table("Pictures", ("data set", "pictures", "median", "5% … 95% megapixels"))
    clips = _table("Clips", ("data set", "clips", "median", "5% … 95% seconds", "frames a s"))
    for name, sizes in survey.media.items():
        if len(sizes.images):
            pixels = sizes.images.prod(axis=1)
            middle = sizes.images[np.argsort(pixels, kind="stable")[len(pixels) // 2]]
            low, high = np.percentile(pixels, (5, 95)) / 1e6
            pictures.add_row(escape(name), f"{len(pixels):,}", f"{middle[0]} x {middle[1]}", f"{low:.2f} … {high:.2f}")
        if len(sizes.clip_seconds):
            low, half, high = np.percentile(sizes.clip_seconds, (5, 50, 95))
            count, rate = len(sizes.clip_seconds), np.median(sizes.clip_rates)
            clips.add_row(escape(name), f"{count:,}", f"{half:.1f} s", f"{low:.1f} … {high:.1f}", f"{rate:.0f}")
    return [table for table in (pictures, clips) if table.row_count]


def _table(title: str, headings: Sequence[str], left: int = 1) -> Table:
    """An empty table whose first `left` columns hold names (folded where long), the others numbers (never cut)."""
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        if i < left:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def _problems_table(survey: Survey) -> Table:
    table = Table(title=f"Left out or noted ({len(survey.problems):,})", title_justify="left")
    for heading in ("data set", "reason", "samples", "for example"):
        table.add_column(heading, justify="right" if heading == "samples" else "left", overflow="fold")
    examples: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for problem in survey.problems:
        counts[problem.dataset, problem.reason] += 1
        examples.setdefault((problem.dataset, problem.reason), f"{problem.key}: {problem.message}")
    for (dataset, reason), count in counts.most_common():
        table.add_row(escape(dataset), reason, f"{count:,}", escape(examples[dataset, reason]))
    for reason, count in survey.unlisted.most_common():
        table.add_row("", reason, f"{count:,}", "further ones, not listed one by one")
    return table
