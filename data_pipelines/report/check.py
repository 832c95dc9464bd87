"""`qwen2vl-data check SHARDS ...`: read every byte of shards and list what is wrong, per key.

Enters: paths or globs of tars. Leaves: a line for each finding, or one JSON object each with `--json`, then a summary;
exit code 1 when a run would lose anything. Costs what decoding everything once costs, over all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.config import LoaderConfig, MediaConfig, PlanConfig
from data_pipelines.errors import ShardError
from data_pipelines.report.check_shard import CheckSettings, Finding, ShardPart
from data_pipelines.report.check_workers import WHOLE, check_parts
from data_pipelines.report.remote_options import add_remote_options, remote_of
from data_pipelines.shards.storage import expand_shards, open_shard
from data_pipelines.tokenizer import TextTokenizer

SHOWN_PER_REASON = 20


@dataclass
class CheckSummary:
    """Counts over all shards. `bad_samples` lose something in a run; `findings` by reason, notes included; `losses` are
    the findings that are no mere notes.
    """

    shards: int = 0
    samples: int = 0
    bad_samples: int = 0
    num_bytes: int = 0
    losses: int = 0
    findings: Counter[str] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        """Count one finding."""
        self.findings[finding.reason] += 1
        self.losses += finding.lost

    def as_json(self) -> dict[str, Any]:
        """The last line of `--json`."""
        return {"type": "summary", **asdict(self), "findings": dict(self.findings.most_common())}


class _Tell(Protocol):
    """What takes findings as they come, and the summary at the end."""

    def finding(self, finding: Finding) -> None:
        """One finding."""
        ...

    def summary(self, summary: CheckSummary) -> None:
        """Print the table of findings by reason and what a run would lose."""
        """Print what was found, by reason."""
        """The counts, once."""
        ...


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check`."""
    parser = commands.add_parser(
        "check",
        help="read every byte of shards and list what is wrong",
        description="Read shards whole: every header's checksum, the end marker, repeated and scattered keys, the "
        "manifest's checksums, each record, every picture decoded, every clip opened and its frames decoded under a "
        "deadline. Each finding names shard, key and reason. Exit code 1 when a run would lose anything "
        "for them; mere notes (scattered keys, no end marker) give 0.",
        epilog="Examples: qwen2vl-data check 'shards/coco/*.tar' | qwen2vl-data check shards/*/*.tar --json",
    )
    parser.add_argument("shards", nargs="+", metavar="TAR", help="paths, globs or ranges such as web-{0000..0099}.tar")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: findings, at last the summary")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="encode the text too, and find what fits no pack")
    parser.add_argument("--template", choices=("plain", "chatml"), default="plain", help="template (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=PlanConfig.max_tokens, help="tokens of a pack (%(default)s)")
    parser.add_argument(
        "--open-only", action="store_true", help="open clips and decode one frame, not all that a run would sample"
    )
    parser.add_argument(
        "--sample-timeout", type=float, default=LoaderConfig.sample_timeout_s, metavar="S",
        help="seconds after which a sample is given up (%(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--decode-timeout", type=float, default=MediaConfig.decode_timeout_s, metavar="S",
        help="CPU seconds a clip may take (%(default)g)",
    )  # fmt: skip
    add_remote_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check and report; 1 when a run would lose anything."""
    if options.tokenizer is not None:
        TextTokenizer(options.tokenizer)  # a bad folder is told once, here, not by every process
    settings = CheckSettings(
        media=MediaConfig(decode_timeout_s=options.decode_timeout),
        plan=PlanConfig(max_tokens=options.max_tokens),
        template=options.template,
        tokenizer=None if options.tokenizer is None else str(options.tokenizer),
        read_frames=not options.open_only,
        remote=remote_of(options),
    )
    shards = expand_shards("", options.shards, settings.remote)
    tell: _Tell = _JsonLines() if options.json else _Lines()
    processes = options.processes or len(os.sched_getaffinity(0))
    summary = check_shards(shards, settings, tell, processes, options.sample_timeout)
    tell.summary(summary)
    return 1 if summary.losses else 0


def check_shards(
    shards: Sequence[str], settings: CheckSettings, tell: _Tell, processes: int = 1, sample_timeout_s: float = 300.0
) -> CheckSummary:
    """Check `shards`; `tell.finding` is called with each finding as it comes."""
    summary = CheckSummary(shards=len(shards))
    parts = []
    for shard in shards:
        try:
            file = open_shard(shard, settings.remote)
            parts += ShardPart.all_of(shard, file.size)
            summary.num_bytes += file.size
            file.close()
        except ShardError as error:
            finding = Finding.of(shard, "", error.reason, error.message)
            summary.add(finding)
            tell.finding(finding)
    with (
        _progress(summary.num_bytes) as bar,
        closing(check_parts(parts, settings, processes, sample_timeout_s)) as results,
    ):
        for checked in results:
            if checked.number != WHOLE:
                summary.samples += 1
                summary.bad_samples += any(finding.lost for finding in checked.findings)
            for finding in checked.findings:
                summary.add(finding)
                tell.finding(finding)
            bar(checked.num_bytes, summary)
    return summary


def counted(count: int, one: str, many: str = "") -> str:
    """A count with its noun: "1 shard", "2 shards", "1,000 losses"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int, CheckSummary], None]]:
    """A bar over the bytes on a terminal; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("checking", total=num_bytes)

        def advance(done: int, summary: CheckSummary) -> None:
            text = f"{counted(summary.samples, 'sample')}, {counted(summary.findings.total(), 'finding')}"
            progress.update(task, advance=done, description=text)

        yield advance


class _JsonLines:
    """Findings and summary for programs: one JSON object a line on stdout."""

    def finding(self, finding: Finding) -> None:
        print(json.dumps({"type": "finding", **asdict(finding)}), flush=True)

    def summary(self, summary: CheckSummary) -> None:
        """Print the table of findings by reason and what a run would lose."""
        print(json.dumps(summary.as_json()), flush=True)


class _Lines:
    """Findings and summary for people; of a reason that repeats, the first twenty."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._shown: Counter[str] = Counter()
        self._lost: dict[str, bool] = {}

    def finding(self, finding: Finding) -> None:
        self._shown[finding.reason] += 1
        self._lost[finding.reason] = finding.lost
        if self._shown[finding.reason] <= SHOWN_PER_REASON:
            where = f"{finding.shard}/{finding.key}" if finding.key else finding.shard
            color = "red" if finding.lost else "yellow"
            self._console.print(f"[{color}]{finding.reason}[/]  {escape(where)}: {escape(finding.message)}")

    def summary(self, summary: CheckSummary) -> None:
        """Print the table of findings by reason and what a run would lose."""
        size = f"{summary.num_bytes / 1e6:,.1f} MB"
        shards, samples = counted(summary.shards, "shard"), counted(summary.samples, "sample")
        table = Table(title=f"{shards}, {samples}, {size}", title_justify="left")
        for heading in ("reason", "findings", "a run"):
            table.add_column(heading, justify="right" if heading == "findings" else "left")
        for reason, count in summary.findings.most_common():
            table.add_row(reason, f"{count:,}", "leaves them out" if self._lost[reason] else "is not harmed")
        if summary.findings:
            self._console.print(table)
        sound = summary.samples - summary.bad_samples
        verb = "is" if 1 in (sound, summary.samples) else "are"
        whole = f"{shards} of {size} read: {sound:,} of {samples} {verb} sound"
        notes = counted(summary.findings.total() - summary.losses, "note")
        self._console.print(f"{whole}, {counted(summary.losses, 'loss', 'losses')}, {notes}")
        if any(count > SHOWN_PER_REASON for count in self._shown.values()):
            self._console.print(f"Of each reason the first {SHOWN_PER_REASON} are shown; --json lists all.")
