"""`qwen2vl-data show CONFIG --step N --rank R` or `--pack K`: exactly the packs a run had, on an inspection page.

Enters: a run's folder (or a file of the same settings), and which packs. Leaves: a page of those packs, rebuilt from
(settings, seed) alone: the plan is run up to them, on lengths, and the loader's reader reads them. Costs about 2 µs a
sample planned, from the beginning or from a loader state, then the decoding of these packs.

It stands here because a run leaves its settings as plain values, so nothing of the trainer is needed; `qwen2vl show`
composes settings from Hydra overrides first, and knows the model's cost where packs are dealt to ranks by it.
"""

from __future__ import annotations

import argparse
import json
import os
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.loader import PackLoader, new_planner
from data_pipelines.plan.balance import order_by_cost
from data_pipelines.plan.planner import Pack, Planner
from data_pipelines.report.collect import read_packs
from data_pipelines.report.data_run import DataRun, read_data_run
from data_pipelines.report.inspection import page_of_packs, reading_progress
from data_pipelines.report.site import clear_site, write_site
from data_pipelines.report.stats import open_run
from data_pipelines.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Wanted:
    """Which packs: number `pack` of the plan, or those of `rank` (None: of all) in step `step`, counted from 1."""

    step: int | None = None
    rank: int | None = None
    pack: int | None = None

    def __post_init__(self) -> None:
        if (self.step is None) == (self.pack is None):
            raise UserError("say which packs: --step N (with --rank R for those of one rank), or --pack K")
        if (self.step is not None and self.step < 1) or (self.pack is not None and self.pack < 0):
            raise UserError(
                f"--step {self.step} counts from 1 as the logs do, --pack {self.pack} from 0 as the plan does"
            )


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
    parser.add_argument("--stage", help="which stage of the run")
    parser.add_argument("--seed", type=int, help="another seed than the file's")
    parser.add_argument("--world", type=int, metavar="N", help="another number of ranks than the run's last start had")
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
    check_course(options.config, options.stage, options.step)
    return show(settings, options)


def show(settings: DataRun, options: argparse.Namespace) -> int:
    """Rebuild the packs that `options` (of `add_show_options`) name, write their page, print its path."""
    wanted = Wanted(options.step, options.rank, options.pack)
    check_reader(settings)
    check_rank(settings, wanted)
    out = options.out or Path(f"pack-{wanted.pack}" if wanted.step is None else _step_name(wanted))
    sources = open_run(settings, options.processes)
    clear_site(out)
    planner = new_planner(settings.data, sources, settings.seed, settings.cost)
    if options.state is not None:
        load_plan(planner, settings, wanted, options.state)
    packs = find_packs(planner, settings, wanted)
    with reading_progress() as progress:
        processes = options.processes or len(os.sched_getaffinity(0))
        tokenizer = TextTokenizer(settings.tokenizer)
        read = read_packs(packs, sources, settings.data, tokenizer, out, processes, progress)
    page = page_of_packs(settings, sources, read)
    page.title = _title(settings, wanted, packs)
    path = write_site(page, out)
    print(path)
    if options.open:
        webbrowser.open(path.resolve().as_uri())
    return 0


def find_packs(planner: Planner, settings: DataRun, wanted: Wanted) -> list[Pack]:
    """The packs asked for, in the order in which the ranks take them; the planner is run up to them.

    Step s (from 1) has packs [(s - 1) * B, s * B), B packs_per_step; micro-step m of rank r is number m * world + r of
    them, in plan order or, with the model's cost, the dearest first: as `loader.PackLoader` deals them.
    """
    if wanted.step is None:
        assert wanted.pack is not None
        return [_advance(planner, wanted.pack)]
    first = (wanted.step - 1) * settings.packs_per_step
    packs = [_advance(planner, first)]
    packs += [planner.next_pack() for _ in range(settings.packs_per_step - 1)]
    if settings.cost is not None:
        packs = order_by_cost(packs, settings.cost)
    return packs if wanted.rank is None else packs[wanted.rank :: settings.world]


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


def check_course(config: Path, stage: str | None, step: int | None) -> None:
    """Refuse a step whose packs follow no longer from its number: the run went back after a loss spike.

    Raises:
        UserError: naming the spike; the packs' numbers stand in the stage's files.
    """
    folder = config if config.is_dir() else config.parent
    if stage is None:  # the only one there is
        stage = next((path.parent.name for path in folder.glob("*/spikes.jsonl")), "")
    path = folder / stage / "spikes.jsonl"
    if step is None or not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        spike = json.loads(line)
        if spike.get("returned_to") is not None and step > spike["returned_to"]:
            raise UserError(
                f"--step {step}: the run went back from step {spike['step']} to {spike['returned_to']} and on with "
                f"other packs; ask for --pack K ({path.name} and the ledger name packs by number)"
            )


def load_plan(planner: Planner, settings: DataRun, wanted: Wanted, path: Path) -> None:
    """Begin at the plan's state in a checkpoint's `state.json`, if it lies before the packs asked for.

    Raises:
        UserError: no loader state in the file, one of other data, budgets or seed, or packs planned before it.
    """
    try:
        stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        state = _loader_state(stored)
        plan = state["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--state {path}: no loader state in it ({error}); name a checkpoint's state.json") from error
    tokenizer = TextTokenizer(settings.tokenizer)
    loader = PackLoader(
        settings.data, tokenizer, settings.packs_per_step, 0, settings.world, settings.seed, cost=settings.cost
    )
    loader.load_state_dict(dict(state))  # refuses a state of other settings, naming them
    first = wanted.pack if wanted.step is None else (wanted.step - 1) * settings.packs_per_step
    if first is None or plan["number"] > first:
        raise UserError(f"--state {path}: begins at pack {plan['number']}, after pack {first}; name an earlier one")
    planner.load_state_dict(plan)


def _loader_state(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The loader's state: the file itself, or one of its entries."""
    entries = [stored, *(value for value in stored.values() if isinstance(value, Mapping))]
    return next((entry for entry in entries if "plan" in entry and "identity" in entry), {})


def _advance(planner: Planner, number: int) -> Pack:
    """Pack `number` of the plan."""
    while planner.number < number:
        planner.next_pack()
    return planner.next_pack()


def _step_name(wanted: Wanted) -> str:
    return f"step-{wanted.step}" + ("" if wanted.rank is None else f"-rank-{wanted.rank}")


def _title(settings: DataRun, wanted: Wanted, packs: list[Pack]) -> str:
    if wanted.step is None:
        return f"Pack {wanted.pack}"
    ranks = f"all {settings.world} ranks" if wanted.rank is None else f"rank {wanted.rank} of {settings.world}"
    return f"Step {wanted.step}, {ranks}: pack {', '.join(str(pack.number) for pack in packs)}"
