"""`qwen2vl plan`: the command line of the forecast."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen2vl_train.config import ConfigError
from qwen2vl_train.overrides import load_config


def add_arguments(commands: Any) -> None:
    """Add the `plan` command to the sub-parsers of `qwen2vl`; it sets `run`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="foretell data, cost, time and memory of an experiment, without a model",
        description="A dry run of an experiment's stages on its real shards: fill, mixture, epochs, FLOPs, time, and "
        "the memory of a rank; which settings fit the GPUs. Without shards: the memory alone. Exits with 1 where the "
        "configured settings do not fit.",
        epilog="Examples: qwen2vl plan experiment=qwen2vl_7b --gpus 64 --gpu H100 | qwen2vl plan experiment=real "
        "data.root=shards data.tokenizer=TOKENIZER --gpus 2 --tokens 1e9 --json",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; stage=NAME plans one stage")
    parser.add_argument("--config-dir", type=Path, help="another folder of YAML files than the packaged one")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (default: the most up to 8 that the stages allow)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="A100, H100, H200, B200 ... (%(default)s)")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU, in place of the named one's")
    parser.add_argument("--peak-flops", type=float, metavar="X", help="per second and GPU, in place of the named one's")
    parser.add_argument("--mfu", type=float, default=0.4, help="expected share of the peak (%(default)s)")
    parser.add_argument("--tokens", type=float, metavar="N", help="length of each stage, in place of its own")
    parser.add_argument("--packs", type=int, default=4000, metavar="N", help="packs to plan per stage (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from data_pipelines.report.indexing import index_progress
    from qwen2vl_train.plan.forecast import as_json, forecast
    from qwen2vl_train.plan.hardware import find_hardware
    from qwen2vl_train.plan.memory import common_ranks
    from qwen2vl_train.plan.page import page

    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu={options.mfu}: a share of the peak, above 0 and at most 1")
    if options.packs < 1:
        raise ConfigError(f"--packs={options.packs}: must be at least 1")
    if options.tokens is not None and not 0 < options.tokens < math.inf:
        raise ConfigError(f"--tokens={options.tokens}: must be finite and above 0")
    run, _ = load_config(options.overrides, options.config_dir, allow_missing=True)
    packs = [run.stages[name].packs_per_step for name in run.chain]
    gpus = options.gpus if options.gpus is not None else common_ranks(packs) * run.engine.sequence_parallel
    hardware = find_hardware(options.gpu, gpus, run.engine.precision, options.gpu_memory, options.peak_flops)
    with index_progress() as progress:
        plan = forecast(run, hardware, options.mfu, options.tokens, options.packs, progress)
    if options.json:
        print(json.dumps(as_json(plan)))
    else:
        Console().print(page(plan))
    return 0 if plan.fits else 1
