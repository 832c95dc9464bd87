"""`qwen2vl`: assemble a start, plan, train, evaluate, generate, show a sample's way, report, print a configuration.

Under torchrun or deepspeed: `torchrun --nproc-per-node 2 -m qwen2vl_train train experiment=demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipelines.errors import UserError
from qwen2vl_train.compose import as_yaml, compose_settings
from qwen2vl_train.config import ConfigError
from qwen2vl_train.overrides import config_dir, load_config
from qwen2vl_train.training.launcher import leave_for_torchrun


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. Bad input ends with one clear message and code 2."""
    words = _without_local_rank(list(arguments if arguments is not None else sys.argv[1:]))
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if rest:  # overrides behind an option, which argparse leaves over
        if not hasattr(options, "overrides") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    try:
        code: int = options.run(options)
    except UserError as error:
        if os.environ.get("QWEN2VL_DEBUG"):
            raise
        rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        where = f" (rank {rank})" if "WORLD_SIZE" in os.environ else ""
        leave_for_torchrun(f"error{where}: {error}", time.time())
        if local_rank == "0" or not isinstance(error, ConfigError):  # a configuration is wrong on all its ranks alike
            print(f"\nerror{where}: {error}", file=sys.stderr, flush=True)
        return 2
    return code


def _without_local_rank(words: list[str]) -> list[str]:
    """The deepspeed launcher adds `--local_rank=N` (older ones in two words) unless told --no_local_rank."""
    kept = []
    while words:
        word = words.pop(0)
        if word == "--local_rank":
            words = words[1:]
        elif not word.startswith("--local_rank="):
            kept.append(word)
    return kept


def _parser() -> argparse.ArgumentParser:
    from qwen2vl_train import ask, assemble, show  # torch and transformers load only now
    from qwen2vl_train.plan import command as plan

    parser = argparse.ArgumentParser("qwen2vl", description="Train Qwen2-VL from its parts: three stages, one trainer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run an experiment's stages, or some of them",
        description="Run the chain of stages of an experiment; the same command continues an interrupted run.",
        epilog="Examples: qwen2vl train experiment=demo | qwen2vl train experiment=demo stage=vision resume=none | "
        "torchrun --nproc-per-node 8 -m qwen2vl_train train experiment=qwen2vl_2b data.root=/data/shards",
    )
    _add_overrides(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model folder on an experiment's held-out sets",
        description="Greedy answers to the held-out questions of an experiment, scored per task against the truth.",
    )
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="a Qwen2-VL folder, e.g. runs/demo/instruct/export")
    evaluate.add_argument("--stage", default="instruct", help="whose template and budgets to use (%(default)s)")
    _add_overrides(evaluate)
    evaluate.set_defaults(run=_evaluate)

    config = commands.add_parser("config", help="print the composed and validated configuration as YAML")
    _add_overrides(config)
    config.set_defaults(run=_config)

    plan.add_arguments(commands)
    assemble.add_arguments(commands)
    ask.add_arguments(commands)
    show.add_arguments(commands)

    report = commands.add_parser("report", help="write report.html for a finished or running run")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run's folder, e.g. runs/demo")
    report.set_defaults(run=_report)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; stage=NAME runs one stage")
    parser.add_argument("--config-dir", type=Path, help="another folder of YAML files than the packaged one")


def _train(options: argparse.Namespace) -> int:
    run, settings = load_config(options.overrides, options.config_dir)
    from qwen2vl_train.report import print_summary
    from qwen2vl_train.stages import run_chain
    from qwen2vl_train.training.failure import exit_after
    from qwen2vl_train.training.stopping import EXIT_PREEMPTED, LeaveOnSignal, Preempted, StopRequest
    from qwen2vl_train.training.watchdog import Watchdog
    from qwen2vl_train.training.world import end_world, start_world

    code = 0
    with StopRequest() as stop:
        with LeaveOnSignal():
            world = start_world(run.engine.timeout_s, run.engine.meeting_s)
        stop.announce = world.is_main
        try:
            with Watchdog(run.watchdog, world, Path(run.run_dir)) as watchdog:
                try:
                    summary = run_chain(run, settings, world, stop, watchdog)
                    if world.is_main:
                        print_summary(summary)
                except Preempted as order:
                    if world.is_main:
                        print(order, file=sys.stderr, flush=True)
                    code = order.code
                world.barrier()
        except Exception as error:
            exit_after(error, world, EXIT_PREEMPTED if stop.is_cause_of(error) else None)
        end_world()  # here, where no exception's frames keep the engine in memory
        if code or stop.requested:
            stop.let_end()
    return code


def _evaluate(options: argparse.Namespace) -> int:
    run, _ = load_config(options.overrides, options.config_dir)
    if options.stage not in run.stages or not run.data.heldout:
        raise ConfigError(f"--stage {options.stage}: choose of {list(run.stages)}; data.heldout={run.data.heldout}")
    from qwen2vl_train.evaluation.runner import evaluate
    from qwen2vl_train.training.failure import exit_after
    from qwen2vl_train.training.stopping import LeaveOnSignal
    from qwen2vl_train.training.watchdog import Watchdog
    from qwen2vl_train.training.world import end_world, start_world

    with LeaveOnSignal():
        world = start_world(run.engine.timeout_s, run.engine.meeting_s)
    data = run.stages[options.stage].data
    at: list[str] = []
    try:
        with Watchdog(run.watchdog, world, folder=None) as watchdog:

            def scored(count: int) -> None:
                """Told after each held-out set."""
                watchdog.note(f"evaluating, {count} sets done", lambda: at, limit_s=run.watchdog.save_s)

            scored(0)
            report = evaluate(options.model, run.data.heldout, data, run.evaluation, world, scored, at)
            if world.is_main:
                print(json.dumps({"held_out": report.metrics, "majority": report.baseline}, indent=1))
            world.barrier()
    except Exception as error:
        exit_after(error, world)
    end_world()
    return 0


def _config(options: argparse.Namespace) -> int:
    run, _ = load_config(options.overrides, options.config_dir)
    composed = compose_settings(options.overrides, (options.config_dir or config_dir()).resolve())
    print(
        "# Each value as a run takes it. A comment ${KEY} says where it comes from: setting that key changes every\n"
        "# value that refers to it (shared: limits of all stages; mixture: a stage's sources); setting the value\n"
        "# itself changes it here alone.\n" + as_yaml(asdict(run), composed),
        end="",
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from qwen2vl_train.report import write_report

    try:
        print(write_report(options.folder))
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"the report of {options.folder} cannot be written ({error}); it stands in the run's folder: copy that to "
            "where you may write, or make room"
        ) from error
    return 0
