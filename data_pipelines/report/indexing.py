"""`qwen2vl-data index SHARDS ...`: build the side indices ahead of a run and say what is in the shards.

Enters: paths or globs of tars; with `--tokenizer` also what is needed to count tokens. Leaves: side files, and a table
of samples, media, tokens, and everything that a run would leave out, with its reason and an example; with `--list` or
`--json` a line for each. Exit code 1 where a shard cannot be read, with `--strict` where anything would be left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from data_pipelines.config import MediaConfig, PlanConfig, RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.index.build import Counting, load_index, try_to_build
from data_pipelines.index.samples import ShardIndex
from data_pipelines.index.source import SourceIndex
from data_pipelines.ledger import LOSSLESS
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.report.check_shard import NO_SAMPLES, Finding, key_in
from data_pipelines.report.remote_options import add_remote_options, remote_of
from data_pipelines.shards.names import public_name
from data_pipelines.shards.storage import REMOTE_DEFAULTS, expand_shards
from data_pipelines.tokenizer import TextTokenizer

# Damage behind which nothing could be read, where no sample was found before it.
_UNREADABLE = {"bad_header", "cut_shard", "read_failed", "unreadable_shard"}


@dataclass
class ShardSurvey:
    """Sums over the shards: samples by task, media by kind, tokens of each usable sample, problems with an example.

    `listed` are the problems one by one, but for the `unlisted` ones that an index of a very bad shard only counts, as
    (shard, reason, number).
    """

    shards: int = 0
    unreadable: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    lengths: list[np.ndarray] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    listed: list[Finding] = field(default_factory=list)
    unlisted: list[tuple[str, str, int]] = field(default_factory=list)

    def tell(self, shard: str, key: str, reason: str, message: str) -> None:
        """Count one problem."""
        self.problems[reason] += 1
        self.listed.append(Finding.of(shard, key_in(key, public_name(shard)), reason, message))

    def add_unreadable(self, shard: str, error: ShardError) -> None:
        """Count a shard that could not be opened or indexed."""
        self.shards += 1
        self.unreadable += 1
        self.tell(shard, error.key, error.reason, error.message)

    def example(self, reason: str) -> str:
        """One problem of that reason in words."""
        finding = next(finding for finding in self.listed if finding.reason == reason)
        return f"{finding.key or finding.shard}: {finding.message}"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `index`."""
    parser = commands.add_parser(
        "index",
        help="build the side indices of shards and check them",
        description="Scan tars (every header's checksum, the end marker, repeated and scattered keys), read each "
        "record and the dimensions of its media, and write a memory-mapped index beside each shard. A run builds what "
        "is missing by itself; this does it ahead, in parallel, and says what a run would leave out. Exit code: 0; 1 "
        "where a shard cannot be read at all, and with --strict where anything would be left out or a shard is empty; "
        "2 for mistakes on the command line, no shard of that name among them.",
        epilog="Examples: qwen2vl-data index 'shards/coco/*.tar' --tokenizer Qwen2-VL-2B-Instruct --max-tokens 16384 | "
        "qwen2vl-data index 'shards/*/*.tar' --list | cut -f3 | sort | uniq -c",
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
    each = parser.add_mutually_exclusive_group()
    each.add_argument("--list", action="store_true", help="each problem as a line: shard, key, reason, message by tabs")
    each.add_argument("--json", action="store_true", help="one JSON object a line: problems, at last the summary")
    add_remote_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Build and report; 1 with a shard that cannot be read, or with `--strict` and losses."""
    remote = remote_of(options)
    shards = expand_shards("", options.shards, remote)
    counting = Counting(TextTokenizer(options.tokenizer), options.template) if options.tokenizer else None
    with index_progress() as progress:
        failed = try_to_build(shards, counting, options.processes, progress, remote, options.rebuild)
    media = MediaConfig(max_pixels=options.max_pixels, min_pixels=min(MediaConfig.min_pixels, options.max_pixels))
    plan = PlanConfig(max_tokens=options.max_tokens, max_patches=options.max_patches)
    survey = survey_shards([shard for shard in shards if shard not in failed], counting, media, plan, remote)
    for shard, error in failed.items():
        survey.add_unreadable(shard, error)
    if counting is not None and not survey.unreadable:
        SourceIndex("index", shards, counting, remote).counts()  # puts them on the roll: a run opens them at once
    if options.json:
        _print_json(survey)
    elif options.list:
        _print_list(survey)
    else:
        _print(survey, plan)
    return 1 if survey.unreadable or (options.strict and survey.problems.keys() - LOSSLESS) else 0


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
        problems = table.problems if table is not None else index.problems
        for problem in problems:
            survey.tell(shard, *problem)
        unlisted = table.unlisted if table is not None else index.unlisted
        survey.problems.update(unlisted)
        survey.unlisted += [(public_name(shard), reason, count) for reason, count in unlisted.items()]
        if index.num_samples == 0:
            reasons = {reason for _, reason, _ in problems}
            survey.unreadable += not reasons.isdisjoint(_UNREADABLE)
            if reasons <= LOSSLESS:
                survey.tell(shard, shard, "no_samples", NO_SAMPLES)
        elif table is not None:
            lengths, events = sample_lengths("index", table, np.arange(index.num_samples), media, plan)
            survey.lengths.append(lengths.tokens[lengths.tokens > 0])
            for event in events:
                survey.tell(shard, event.key, event.reason, event.message)
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
        table.add_row(f"[red]{reason}[/]", f"{count:,}, e.g. {escape(survey.example(reason))}")
    console = Console()
    console.print(table)
    if survey.problems:
        console.print("--list shows each one.")


def _print_list(survey: ShardSurvey) -> None:
    """One line a problem, for `cut` and `grep`."""
    for finding in survey.listed:
        print("\t".join(" ".join(str(value).split()) for value in astuple(finding)[:4]))
    for shard, reason, count in survey.unlisted:
        print(f"{shard}\t\t{reason}\tand {count} more: `qwen2vl-data check` lists each")


def _print_json(survey: ShardSurvey) -> None:
    for finding in survey.listed:
        print(json.dumps({"type": "finding", **asdict(finding)}))
    summary = {
        "type": "summary",
        "shards": survey.shards,
        "unreadable": survey.unreadable,
        "samples": survey.tasks.total(),
        "tokens": sum(int(lengths.sum()) for lengths in survey.lengths),
        "problems": dict(survey.problems.most_common()),
        "unlisted": [list(entry) for entry in survey.unlisted],
    }
    print(json.dumps(summary))
