"""`qwen2vl-data index SHARDS ...`: build the side indices ahead of a run and say what is in the shards.

Enters: paths or globs of tars; with `--tokenizer` also what is needed to count tokens. Leaves: side files, and a table
of samples, media, tokens, and everything that a run would leave out, with its reason and an example.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.config import MediaConfig, PlanConfig, RemoteConfig
from data_pipelines.index.build import Counting, build_missing, load_index
from data_pipelines.index.samples import ShardIndex
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import LOSSLESS
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.report.remote_options import add_remote_options, remote_of
from data_pipelines.shards.storage import REMOTE_DEFAULTS, expand_shards
from data_pipelines.tokenizer import TextTokenizer


@dataclass
class ShardSurvey:
    """Sums over the shards: samples by task, media by kind, tokens of each usable sample, problems with an example."""

    shards: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    lengths: list[np.ndarray] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def tell(self, key: str, reason: str, message: str) -> None:
        """Count one problem; the first of each reason is kept as the example."""
        self.problems[reason] += 1
        self.examples.setdefault(reason, f"{key}: {message}")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `index`."""
    parser = commands.add_parser(
        "index",
        help="build the side indices of shards and check them",
        description="Scan tars (every header's checksum, the end marker, repeated and scattered keys), read each "
        "record and the dimensions of its media, and write a memory-mapped index beside each shard. A run builds what "
        "is missing by itself; this does it ahead, in parallel, and says what a run would leave out.",
        epilog="Example: qwen2vl-data index 'shards/coco/*.tar' --tokenizer Qwen2-VL-2B-Instruct --max-tokens 16384",
    )
    parser.add_argument("shards", nargs="+", metavar="TAR", help="paths, globs or ranges such as web-{0000..0099}.tar")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="count tokens too, with this tokenizer")
    parser.add_argument("--template", choices=("plain", "chatml"), default="plain", help="template (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=PlanConfig.max_tokens, help="tokens of a pack (%(default)s)")
    parser.add_argument("--max-patches", type=int, default=PlanConfig.max_patches, help="its patches (%(default)s)")
    parser.add_argument("--max-pixels", type=int, default=MediaConfig.max_pixels, help="of a still image (%(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")
    parser.add_argument("--rebuild", action="store_true", help="index anew what is indexed: after changes in place")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if anything would be left out")
    add_remote_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Build and report; 1 with `--strict` and problems."""
    remote = remote_of(options)
    shards = expand_shards("", options.shards, remote)
    counting = Counting(TextTokenizer(options.tokenizer), options.template) if options.tokenizer else None
    with index_progress() as progress:
        build_missing(shards, counting, options.processes, progress, remote, options.rebuild)
    media = MediaConfig(max_pixels=options.max_pixels, min_pixels=min(MediaConfig.min_pixels, options.max_pixels))
    plan = PlanConfig(max_tokens=options.max_tokens, max_patches=options.max_patches)
    survey = survey_shards(shards, counting, media, plan, remote)
    if counting is not None:
        SourceIndex("index", shards, counting, remote).counts()  # puts them on the roll: a run opens them at once
    _print(survey, plan)
    return 1 if options.strict and survey.problems.keys() - LOSSLESS else 0


def survey_shards(
    shards: list[str],
    counting: Counting | None,
    media: MediaConfig,
    plan: PlanConfig,
    remote: RemoteConfig = REMOTE_DEFAULTS,
) -> ShardSurvey:
    """What the indices of `shards` hold. Token lengths need `counting`; samples over the budgets are problems."""
    survey = ShardSurvey(shards=len(shards))
    source = SourceIndex("index", shards, counting, remote) if counting is not None else None
    for number, shard in enumerate(shards):
        table = source.table(number) if source is not None else None
        index = table.index if table is not None else load_index(shard, remote)
        _count_index(survey, index)
        for problem in table.problems if table is not None else index.problems:
            survey.tell(*problem)
        survey.problems.update(table.unlisted if table is not None else index.unlisted)
        if table is not None and index.num_samples:
            lengths, events = sample_lengths("index", table, np.arange(index.num_samples), media, plan)
            survey.lengths.append(lengths.tokens[lengths.tokens > 0])
            for event in events:
                survey.tell(event.key, event.reason, event.message)
    return survey


@contextmanager
def index_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar over shards on a terminal; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("indexing", total=None)
        yield lambda shard, done, total: progress.update(task, completed=done, total=total)


def _count_index(survey: ShardSurvey, index: ShardIndex) -> None:
    for number, count in zip(*np.unique(index.arrays["task"], return_counts=True), strict=True):
        survey.tasks[index.task_name(int(number))] += int(count)
    videos = int(np.count_nonzero(index.arrays["media_kind"]))
    survey.media["images"] += len(index.arrays["media_kind"]) - videos
    survey.media["clips"] += videos


def _print(survey: ShardSurvey, plan: PlanConfig) -> None:
    table = Table(show_header=False, title=f"{survey.shards:,} shards", title_justify="left")
    kinds = ", ".join(f"{task} {count:,}" for task, count in survey.tasks.most_common())
    table.add_row("samples", f"{survey.tasks.total():,} ({kinds})" if kinds else "0")
    table.add_row("media", ", ".join(f"{count:,} {kind}" for kind, count in survey.media.items()))
    if survey.lengths:
        lengths = np.concatenate(survey.lengths)
        if len(lengths):
            low, middle, high = (int(value) for value in np.percentile(lengths, (5, 50, 95)))
            spread = f"5% {low:,}, median {middle:,}, 95% {high:,}, longest {int(lengths.max()):,}"
            table.add_row("tokens", f"{int(lengths.sum()):,} ({spread})")
            table.add_row("packs", f"about {-(-int(lengths.sum()) // plan.max_tokens):,} of {plan.max_tokens:,} tokens")
    for reason, count in survey.problems.most_common():
        table.add_row(f"[red]{reason}[/]", f"{count:,}, e.g. {escape(survey.examples[reason])}")
    Console().print(table)
