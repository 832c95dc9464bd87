"""`qwen2vl-data show CONFIG --step N --rank R` or `--pack K`: exactly the packs a run had, on an inspection page.

Enters: a run's folder (or a file of the same settings), and which packs. Leaves: a page of those packs, rebuilt from
(settings, seed) alone: the plan is run up to them, on lengths, and the loader's reader reads them. Costs about 2 µs a
sample planned, from the beginning, from the last change of data that the run accepted (`course.py`) or from a loader
state, then the decoding of these packs.

It stands here because a run leaves its settings as plain values, so nothing of the trainer is needed; `qwen2vl show`
composes settings from Hydra overrides first, and knows the model's cost where packs are dealt to ranks by it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.loader import PackLoader, new_planner
from data_pipelines.plan.balance import order_by_cost
from data_pipelines.plan.change import CHANGES_NAME
from data_pipelines.plan.planner import Pack, Planner
from data_pipelines.report.collect import read_packs
from data_pipelines.report.course import Course, read_course
from data_pipelines.report.data_run import DataRun, read_data_run
from data_pipelines.report.inspection import page_of_packs, reading_progress
from data_pipelines.report.site import clear_site, write_site
from data_pipelines.report.stats import open_run
from data_pipelines.tokenizer import TextTokenizer

PROGRESS_S = 3.0
SHOWN_RANKS = 8


@dataclass(frozen=True)
class Wanted:
    """Which packs: number `pack` of the plan, or those of `rank` (None: of all) in step `step`, counted from 1."""

    step: int | None = None
    rank: int | None = None
    pack: int | None = None

    def __post_init__(self) -> None:
        if (self.step is None) == (self.pack is None):
            raise UserError("say which packs: --step N (with --rank R for those of one rank), or --pack K")
        if self.step is not None and self.step < 1:
            raise UserError(f"--step {self.step}: steps count from 1, as the logs do")
        if self.pack is not None and self.pack < 0:
            raise UserError(f"--pack {self.pack}: packs count from 0, as ledgers and errors name them")

    def first_pack(self, settings: DataRun, course: Course) -> int:
        """The first number of the packs, or of their step's."""
        if self.pack is not None:
            return self.pack
        assert self.step is not None
        return course.first_pack(self.step, settings.packs_per_step)


@dataclass(frozen=True)
class Found:
    """The packs asked for in the order in which the ranks take them, the rank of each, and their step where known."""

    packs: list[Pack]
    ranks: list[int]
    step: int | None


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `show`."""
    parser = commands.add_parser(
        "show",
        help="rebuild the packs of a step, or one pack, and show them",
        description="Rebuild exactly the packs that a run had at a step, or pack K of its plan, from its settings and "
        "seed alone, and write them as an inspection page.",
        epilog="Examples: qwen2vl-data show runs/demo --stage multitask --step 120 --rank 1 --open | "
        "qwen2vl-data show data.yaml --pack 7 --out page",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a run's folder, its config.json, or a YAML file")
    parser.add_argument("--stage", help="which stage of the run (default: the only one it trains)")
    parser.add_argument("--seed", type=int, help="another seed than the file's")
    parser.add_argument(
        "--world", type=int, metavar="N", help="another number of ranks than the stage's last start had"
    )
    add_show_options(parser)
    parser.set_defaults(run=run)


def add_show_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which packs, and where the page goes; also those of `qwen2vl show`."""
    parser.add_argument("--step", type=int, metavar="N", help="the packs of step N, the first being 1 as in the logs")
    parser.add_argument("--rank", type=int, metavar="R", help="of that step only those of rank R")
    parser.add_argument("--pack", type=int, metavar="K", help="the pack of number K, as ledgers and errors name it")
    parser.add_argument(
        "--state", type=Path, metavar="FILE", help="begin at a checkpoint's state.json (saves planning)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the page's folder (default: named after the packs)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")


def run(options: argparse.Namespace) -> int:
    """Write the page and print its path."""
    settings = read_data_run(options.config, options.stage, seed=options.seed, world=options.world)
    return show(settings, options, read_course(options.config, options.stage, settings.packs_per_step))


def show(settings: DataRun, options: argparse.Namespace, course: Course | None = None) -> int:
    """Rebuild the packs that `options` (of `add_show_options`) name, write their page, print its path.

    `course` tells what a run's settings do not; None: all follows from them.
    """
    wanted, course = Wanted(options.step, options.rank, options.pack), course or Course()
    check_reader(settings)
    check_rank(settings, wanted)
    first = wanted.first_pack(settings, course)
    course.check_reach(first)
    state = None if options.state is None else read_state(options.state)
    change = course.start(first, None if state is None else state["plan"]["number"])
    out = options.out or Path(f"pack-{wanted.pack}" if wanted.step is None else _step_name(wanted))
    sources = open_run(settings, options.processes)
    clear_site(out)
    planner = new_planner(settings.data, sources, settings.seed, settings.cost)
    if change is not None:
        load_plan(planner, settings, first, change.loader, CHANGES_NAME)
    elif state is not None:
        load_plan(planner, settings, first, state, f"--state {options.state}")
    found = find_packs(planner, settings, wanted, course)
    with reading_progress() as progress:
        processes = options.processes or len(os.sched_getaffinity(0))
        tokenizer = TextTokenizer(settings.tokenizer)
        read = read_packs(found.packs, sources, settings.data, tokenizer, out, processes, progress)
    page = page_of_packs(settings, sources, read)
    page.title = title_of(settings, wanted, found)
    path = write_site(page, out)
    print(path)
    if options.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def find_packs(planner: Planner, settings: DataRun, wanted: Wanted, course: Course | None = None) -> Found:
    """The packs asked for; the planner is run up to them, from where it stands.

    Step s (from 1) has packs [(s - 1) * B, s * B), B packs_per_step, moved by what `course` tells; micro-step m of rank
    r is number m * world + r of them, in plan order or, with the model's cost, the dearest first: as
    `loader.PackLoader` deals them.
    """
    course, size = course or Course(), settings.packs_per_step
    if wanted.step is not None:
        step, first = wanted.step, course.first_pack(wanted.step, size)
    else:
        assert wanted.pack is not None
        place = course.step_of(wanted.pack, size)
        if place is None or planner.number > place[1]:  # begun in the middle of the step
            return Found([_advance(planner, wanted.pack)], [], None)
        step, first = place
    dealt = [_advance(planner, first), *(planner.next_pack() for _ in range(size - 1))]
    if settings.cost is not None:
        dealt = order_by_cost(dealt, settings.cost)
    packs = list(enumerate(dealt))
    if wanted.pack is not None:
        packs = [(place, pack) for place, pack in packs if pack.number == wanted.pack]
    elif wanted.rank is not None:
        packs = packs[wanted.rank :: settings.world]
    return Found([pack for _, pack in packs], [place % settings.world for place, _ in packs], step)


def check_reader(settings: DataRun) -> None:
    """Refuse data that is read once: its packs followed from what came when, and cannot be planned again.

    Raises:
        UserError: with what there is instead.
    """
    if settings.data.reader != "index":
        raise UserError(
            f"reader={settings.data.reader}: the packs of streamed shards cannot be rebuilt. The run's ledger names "
            "the samples that were lost; `qwen2vl-data inspect` shows what the shards hold"
        )


def check_rank(settings: DataRun, wanted: Wanted) -> None:
    """Refuse a rank the run does not have, or one without a step.

    Raises:
        UserError: naming the ranks there are.
    """
    if wanted.rank is None:
        return
    if wanted.step is None:
        raise UserError(f"--rank {wanted.rank} needs --step: a pack by its number has no rank")
    if not 0 <= wanted.rank < settings.world:
        raise UserError(f"--rank {wanted.rank}: the run has ranks 0 to {settings.world - 1}; see --world")


def read_state(path: Path) -> Mapping[str, Any]:
    """The loader's state in a checkpoint's `state.json`: the file itself, or one of its entries.

    Raises:
        UserError: there is none.
    """
    try:
        stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = [stored, *(value for value in stored.values() if isinstance(value, Mapping))]
        state = next(entry for entry in entries if "identity" in entry and "number" in entry["plan"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        why = getattr(error, "strerror", None) or "no loader state in it"
        raise UserError(f"--state {path}: {why}; name a checkpoint's state.json") from error
    return state


def load_plan(planner: Planner, settings: DataRun, first: int, state: Mapping[str, Any], name: str) -> None:
    """Begin at the loader's `state`, called `name` in errors, if it lies before the pack `first`.

    Raises:
        UserError: the state is one of other data, budgets or seed, or packs planned before it are asked for.
    """
    number = state["plan"]["number"]
    if number > first:
        raise UserError(f"{name}: begins at pack {number}, after pack {first}; name an earlier one")
    tokenizer = TextTokenizer(settings.tokenizer)
    loader = PackLoader(
        settings.data, tokenizer, settings.packs_per_step, 0, settings.world, settings.seed, cost=settings.cost
    )
    ours, theirs = loader.state_dict()["identity"], state["identity"]
    changed = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    if changed:
        listed = "; ".join(f"{key}: was {theirs.get(key)}, is {ours.get(key)}" for key in changed)
        raise UserError(f"{name}: of other settings ({listed}); give those of then, with qwen2vl show OVERRIDES")
    loader.load_state_dict(dict(state))
    planner.load_state_dict(loader.state_dict()["plan"])


def title_of(settings: DataRun, wanted: Wanted, found: Found) -> str:
    """What the page shows: the packs' numbers, their step and ranks."""
    numbers = [pack.number for pack in found.packs]
    if wanted.step is None:
        place = f": step {found.step}, rank {found.ranks[0]} of {settings.world}" if found.step else ""
        return f"Pack {wanted.pack}{place}"
    if wanted.rank is not None:
        return f"Step {wanted.step}, rank {wanted.rank} of {settings.world}: pack {', '.join(map(str, numbers))}"
    if settings.world > SHOWN_RANKS:
        return f"Step {wanted.step}, all {settings.world} ranks: packs {min(numbers)} to {max(numbers)}"
    ranks = [
        f"rank {rank} pack {', '.join(map(str, numbers[rank :: settings.world]))}" for rank in range(settings.world)
    ]
    return f"Step {wanted.step}: {'; '.join(ranks)}"


def _advance(planner: Planner, number: int) -> Pack:
    """Pack `number` of the plan; a line on stderr every few seconds says how far it is."""
    told = time.monotonic()
    while planner.number < number:
        planner.next_pack()
        if time.monotonic() - told > PROGRESS_S:
            print(f"planned {planner.number:,} of {number:,} packs", file=sys.stderr, flush=True)
            told = time.monotonic()
    return planner.next_pack()


def _step_name(wanted: Wanted) -> str:
    return f"step-{wanted.step}" + ("" if wanted.rank is None else f"-rank-{wanted.rank}")
