"""`qwen2vl-data import SOURCE ... --out DIR`: a public format → shards, manifest and ledger."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data_pipelines.sources import (
    chat,
    classes,
    clips,
    coco,
    flickr30k,
    huggingface,
    manifest,
    ocr,
    records,
    refcoco,
    text,
    visual_genome,
    vqa,
    webdataset_tars,
)
from data_pipelines.sources.cleaning import RuleCount, read_rules
from data_pipelines.sources.importer import LEDGER_NAME, ImportReport, run_import
from data_pipelines.sources.shard_groups import ImportSettings

SOURCES: dict[str, ModuleType] = {
    "coco": coco,
    "chat": chat,
    "ocr": ocr,
    "clips": clips,
    "text": text,
    "vqa": vqa,
    "classes": classes,
    "visual-genome": visual_genome,
    "refcoco": refcoco,
    "flickr30k": flickr30k,
    "huggingface": huggingface,
    "webdataset": webdataset_tars,
    "records": records,
    "manifest": manifest,
}
_COMMON = ("command", "source", "run", "out", "name", "processes", "overwrite", "max_records", "max_bytes")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `import` with one sub-command per source."""
    parser = commands.add_parser(
        "import",
        help="turn a public format into shards",
        description="Turn a public format into webdataset shards, with a manifest and a ledger of what was left out.",
        epilog="`qwen2vl-data import SOURCE --help` tells what a source reads. Example: qwen2vl-data import coco "
        "--images val2017 --captions captions_val2017.json --instances instances_val2017.json --out shards/coco",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    common = _common_options()
    for name, module in SOURCES.items():
        child = sources.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[common],
        )
        module.add_arguments(child)
        child.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run one import; 0 if any sample was written, 1 if the source held none that is usable."""
    console = Console(stderr=True)
    settings = _settings(options)
    entries = SOURCES[options.source].read(options)
    with _progress(console, settings.name) as (advance, expect):
        report = run_import(entries, settings, advance, expect)
    _print_report(report, settings)
    if report.records == 0:
        console.print(f"no usable sample: see {settings.out / LEDGER_NAME}")
    return 0 if report.records else 1


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards, one per import")
    group.add_argument("--name", metavar="NAME", help="prefix of the shards (default: the source)")
    group.add_argument(
        "--max-records", type=_positive, default=1000, metavar="N", help="samples per shard (default: 1000)"
    )
    group.add_argument(
        "--max-bytes", type=_positive, default=512 << 20, metavar="B", help="media bytes per shard (default: 512 MiB)"
    )
    group.add_argument(
        "--processes", type=_positive, default=1, metavar="N", help=f"worker processes (this machine: {os.cpu_count()})"
    )
    group.add_argument("--clean", type=Path, metavar="YAML", help="cleaning rules (see configs/cleaning)")
    group.add_argument("--verify", action="store_true", help="decode every picture once, to find damaged ones now")
    group.add_argument("--overwrite", action="store_true", help="replace a finished import in the folder")
    return common


def _positive(words: str) -> int:
    value = int(words)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _settings(options: argparse.Namespace) -> ImportSettings:
    given: dict[str, Any] = {
        name: [str(entry) for entry in value]
        if isinstance(value, list)
        else str(value)
        if isinstance(value, Path)
        else value
        for name, value in sorted(vars(options).items())
        if name not in _COMMON
    }
    return ImportSettings(
        out=options.out,
        name=options.name or options.source,
        source=options.source,
        options=given,
        max_records=options.max_records,
        max_bytes=options.max_bytes,
        processes=options.processes,
        overwrite=options.overwrite,
        verify=options.verify,
        rules=read_rules(options.clean) if options.clean is not None else (),
    )


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} items/s" if task.speed else "")


@contextmanager
def _progress(console: Console, name: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Progress on the terminal, as two functions: so many more done, so many in all (whence the time left).

    Nothing is shown where the output is no terminal.
    """
    words, count = TextColumn("{task.description}"), MofNCompleteColumn()
    columns = (words, BarColumn(), count, _Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield (lambda done: progress.advance(task, done)), (lambda total: progress.update(task, total=total))


def _print_report(report: ImportReport, settings: ImportSettings) -> None:
    table = Table(title=f"{settings.name}: {settings.out}", title_justify="left", show_header=False)
    table.add_row("entries read", f"{report.items:,}")
    table.add_row("samples written", f"{report.records:,} ({', '.join(f'{k} {v:,}' for k, v in report.tasks.items())})")
    table.add_row("media stored", f"{report.media:,}")
    table.add_row("shards", f"{report.shards:,}, {report.bytes / 1e6:,.1f} MB")
    told = ", ".join(f"{reason} {count:,}" for reason, count in report.reasons.items()) or "nothing"
    table.add_row(f"left out ({LEDGER_NAME})", told)
    Console().print(table)
    if report.cleaning:
        _print_cleaning(report.cleaning)


def _print_cleaning(counts: Sequence[RuleCount]) -> None:
    table = Table("rule", "samples", "captions", "rewritten", "boxes", title="cleaning", title_justify="left")
    for count in counts:
        table.add_row(
            count.rule,
            f"{count.samples_before:,} → {count.samples_after:,}",
            f"{count.captions_before:,} → {count.captions_after:,}",
            f"{count.changed:,}",
            f"{count.boxes_before:,} → {count.boxes_after:,}",
        )
    Console().print(table)
