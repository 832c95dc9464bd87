"""`qwen2vl-data inspect SHARDS ... --out DIR`: a page that shows what a model will see.

Enters: shards, or a file of settings. Leaves: an HTML page in a folder: the mixture, its lengths, sizes and fill;
samples with boxes, frames, tokens, supervision and positions; packs. Costs the indices where they are missing, and
reading and decoding `--max-samples` samples and `--packs` packs.
"""

from __future__ import annotations

import argparse
import os
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.config import DataConfig
from data_pipelines.index.source import SourceIndex
from data_pipelines.plan.planner import Pack
from data_pipelines.report.collect import ReadPack, choose_samples, read_packs
from data_pipelines.report.data_run import DataRun, add_data_options, data_run_of
from data_pipelines.report.overview import charts, mixture_rows, pack_rows
from data_pipelines.report.site import Page, clear_site, write_site
from data_pipelines.report.stats import PLANNED_PACKS, describe_fill, open_run
from data_pipelines.report.survey import Survey, fills, plan_packs, survey_sources
from data_pipelines.samples import LedgerEvent
from data_pipelines.tokenizer import TextTokenizer

DRAWN_PACKS = 60


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="write a page that shows samples, tokens, boxes, frames and packs",
        description="Write an HTML page (it opens from disk, without a network): the mixture, its lengths, sizes and "
        "fill; samples with boxes and quads, frames as sampled, the token string with what is supervised and M-RoPE "
        "positions; packs with their documents.",
        epilog="Examples: qwen2vl-data inspect shards/*/*.tar --tokenizer Qwen2-VL-2B-Instruct --out page | "
        "qwen2vl-data inspect --config runs/demo --stage multitask --out page --open",
    )
    add_data_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or that of an older page")
    parser.add_argument("--max-samples", type=int, default=300, metavar="N", help="samples shown (%(default)s)")
    parser.add_argument(
        "--packs", type=int, default=4, metavar="N", help="packs whose documents are shown (%(default)s)"
    )
    parser.add_argument("--title", help="the page's title")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page and print its path."""
    settings = data_run_of(options)
    sources = open_run(settings, options.processes)
    clear_site(options.out)
    processes = options.processes or len(os.sched_getaffinity(0))
    title = options.title or f"{', '.join(settings.data.sources)}"
    path = inspect_mixture(settings, sources, options.out, title, options.max_samples, options.packs, processes)
    print(path)
    if options.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def inspect_mixture(
    run: DataRun,
    sources: Sequence[SourceIndex],
    out: Path,
    title: str,
    max_samples: int,
    num_packs: int,
    processes: int,
) -> Path:
    """Write the page of a mixture into the empty folder `out`; the path of its `index.html`."""
    survey = survey_sources(sources, run.data)
    planned = plan_packs(sources, run, survey.num_tokens, PLANNED_PACKS)
    packs = planned[:num_packs]
    alone = choose_samples(survey, sources, run.data, max_samples)
    tokenizer = TextTokenizer(run.tokenizer)
    with reading_progress() as progress:
        read = read_packs([*alone, *packs], sources, run.data, tokenizer, out, processes, progress)
    page = page_of_packs(run, sources, read[len(alone) :], planned[num_packs:DRAWN_PACKS])
    page.title = title
    events = [LedgerEvent(**event) for single in read[: len(alone)] for event in single.events]
    page.documents += [document for single in read[: len(alone)] for document in single.documents]
    page.problems = [*page.problems, *events, *survey.problems]
    page.mixture, page.charts = mixture_rows(survey), charts(survey, planned, run.data)
    page.tiles = _tiles(survey, planned, run.data)
    page.fill = describe_fill(planned, run) if planned else ""
    return write_site(page, out)


def page_of_packs(
    run: DataRun, sources: Sequence[SourceIndex], read: Sequence[ReadPack], drawn: Sequence[Pack] = ()
) -> Page:
    """A page of packs: those in `read` with their documents, then those only `drawn` as bars."""
    plan, media = run.data.plan, run.data.media
    facts = [
        f"packs of {plan.max_tokens:,} tokens and {plan.max_patches:,} patches",
        f"template {run.data.template}",
        f"pictures of {media.min_pixels:,} to {media.max_pixels:,} pixels",
        f"tokenizer {'/'.join(Path(run.tokenizer).resolve().parts[-2:])}",
        f"seed {run.seed}",
        f"written {time.strftime('%Y-%m-%d %H:%M')}",
    ]
    page = Page("packs", facts, list(run.data.sources), (plan.max_tokens, plan.max_patches))
    places: dict[tuple[int, int], int] = {}
    for pack in read:
        for document in pack.documents:
            places[pack.pack.number, document["item"]] = len(page.documents)
            page.documents.append({**document, "pack": pack.pack.number})
    page.packs = pack_rows([*(pack.pack for pack in read), *drawn], sources, places)
    page.problems = [LedgerEvent(**event) for pack in read for event in pack.events if not event["indexed"]]
    return page


@contextmanager
def reading_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over samples on a terminal, nothing elsewhere; as `read_packs` wants it."""
    columns = (TextColumn("reading samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tiles(survey: Survey, planned: Sequence[Pack], config: DataConfig) -> list[tuple[str, str, str]]:
    pictures = sum(len(sizes.images) for sizes in survey.media.values())
    seconds = sum(float(sizes.clip_seconds.sum()) for sizes in survey.media.values())
    clips = sum(len(sizes.clip_seconds) for sizes in survey.media.values())
    full = fills(planned, config)
    return [
        ("samples", f"{survey.num_samples:,}", f"{len(survey.media)} data sets"),
        ("tokens", f"{survey.num_tokens:,}", f"about {-(-survey.num_tokens // config.plan.max_tokens):,} packs"),
        ("pictures", f"{pictures:,}", "stills"),
        ("clips", f"{clips:,}", f"{seconds / 60:,.1f} minutes"),
        ("fill", f"{100 * full.mean():.2f}%" if len(full) else "–", f"mean of {len(full):,} planned packs"),
        ("left out", f"{survey.left_out:,}", "reasons below" if survey.problems else "nothing"),
    ]
