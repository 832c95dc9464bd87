"""`qwen2vl show`: exactly the packs of a step, from an experiment's configuration, on an inspection page.

Enters: Hydra overrides as given to `train`, the stage, the step and rank (or a pack's number). Leaves: the page that
`qwen2vl-data show` writes for a run's folder. It stands here because overrides are composed by this package alone; what
rebuilds and shows the packs belongs to the data and knows nothing of training.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_pipelines.report.course import Course
from data_pipelines.report.data_run import DataRun
from data_pipelines.report.show import add_show_options, show
from qwen2vl_train.config import ConfigError, RunConfig
from qwen2vl_train.overrides import load_config
from qwen2vl_train.training.balancing import pack_cost


def add_arguments(commands: Any) -> None:
    """Add the `show` command to the sub-parsers of `qwen2vl`; it sets `run`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "show",
        help="rebuild the packs of a step, or one pack, and show them on a page",
        description="Rebuild exactly the packs that an experiment has at a step, or pack K of its plan, from its "
        "configuration and seed, and write them as an inspection page. For a run that exists, `qwen2vl-data show "
        "RUN_DIR` reads the settings the stage was started with.",
        epilog="Example: qwen2vl show experiment=demo --stage multitask --step 120 --rank 1 --world 2 --open",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, as given to train")
    parser.add_argument("--config-dir", type=Path, help="another folder of YAML files than the packaged one")
    parser.add_argument("--stage", help="which stage (default: the only one that runs)")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="number of ranks (%(default)s)")
    add_show_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    run, _ = load_config(options.overrides, options.config_dir)
    settings = data_run(run, options.stage, options.world)
    name = stage_of(run, options.stage)
    return show(settings, options, Course(name, packs=run.stages[name].steps * settings.packs_per_step))


def stage_of(run: RunConfig, stage: str | None) -> str:
    """The stage that is named, or the only one that runs.

    Raises:
        ConfigError: none is named and there are several, or no such stage.
    """
    name = stage or (run.chain[0] if len(run.chain) == 1 else "")
    if name not in run.stages:
        given = f"--stage {stage} is no stage of this experiment" if stage else "say which stage with --stage"
        raise ConfigError(f"{given}: choose one of {', '.join(run.stages)}")
    return name


def data_run(run: RunConfig, stage: str | None, world: int) -> DataRun:
    """What decides the packs of a stage of `run` on `world` ranks.

    Raises:
        ConfigError: no such stage, or a number of ranks that does not divide the packs of a step.
    """
    name = stage_of(run, stage)
    shared = run.engine.sequence_parallel  # ranks that hold one pack together
    if world % shared:
        raise ConfigError(f"--world {world} is not a multiple of engine.sequence_parallel={shared}")
    chosen = run.stages[name]
    try:
        cost = pack_cost(run.model.config, chosen.trainable)
        return DataRun(run.data.tokenizer, chosen.data, run.seed, chosen.packs_per_step, world // shared, cost)
    except ValueError as error:
        raise ConfigError(f"stages.{name}: {error}") from error
