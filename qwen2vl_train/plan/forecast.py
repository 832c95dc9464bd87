"""A whole run foretold: each stage's data, time and memory on a machine, and what would fit it.

Enters: a validated configuration, the machine, a wished share of its peak (MFU). Leaves: `Forecast`, the same as a page
and as JSON. Without shards or tokenizer the memory is still foretold: it follows from the budgets alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipelines.index.progress import Progress
from data_pipelines.loader import check_fit, open_sources
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.compose import NOT_GIVEN
from qwen2vl_train.config import ConfigError, RunConfig, ScheduleConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import parameter_counts
from qwen2vl_train.plan.hardware import Hardware
from qwen2vl_train.plan.memory import (
    Choice,
    RankMemory,
    Setting,
    as_dict,
    candidates,
    choose,
    fewest_gpus,
    rank_memory,
)
from qwen2vl_train.plan.rehearsal import Rehearsal, rehearse


@dataclass(frozen=True)
class StageForecast:
    """One stage. `steps` are the configured ones, or as many as a length in tokens takes (without data: of full packs).

    `seconds` None: peak unknown.
    """

    name: str
    trainable: Sequence[str]
    steps: int
    packs_per_step: int
    accumulation: int
    memory: RankMemory
    rehearsal: Rehearsal | None
    seconds: float | None

    @property
    def tokens(self) -> float | None:
        """All tokens of the stage."""
        return None if self.rehearsal is None else self.rehearsal.tokens_per_step * self.steps


@dataclass(frozen=True)
class Forecast:
    """The run. `no_data` says why there is nothing about data; `choices` go from the fastest to the most frugal."""

    run: RunConfig
    model: ModelConfig
    hardware: Hardware
    mfu: float
    setting: Setting
    stages: Sequence[StageForecast]
    no_data: str | None
    choices: Sequence[Choice]
    fewest_gpus: int | None

    @property
    def needed_bytes(self) -> int:
        """On one GPU, in the stage that needs most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the configured settings do."""
        return self.needed_bytes <= self.hardware.usable_bytes

    @property
    def best(self) -> Choice | None:
        """The fastest setting that fits, if any does."""
        return next((choice for choice in self.choices if choice.fits), None)


def forecast(
    run: RunConfig,
    hardware: Hardware,
    mfu: float,
    tokens: float | None = None,
    max_packs: int = 4000,
    progress: Progress | None = None,
) -> Forecast:
    """Foretell every stage of the chain; `tokens` is the length of each in place of the configured one.

    Raises:
        ConfigError: ranks that do not divide the packs or heads, or a vocabulary that nothing states.
        ShardError: shards that are named but absent or unreadable.
    """
    setting = Setting.of(run.engine, run.model)
    check_ranks(run, hardware.gpus)
    no_data = why_no_data(run)
    named = (Path(run.data.tokenizer) / "tokenizer.json").is_file()
    tokenizer = TextTokenizer(run.data.tokenizer) if named or no_data is None else None
    config = sized_model(run, tokenizer)
    if tokens is not None and no_data:
        raise ConfigError(f"--tokens={tokens:g} needs shards to count steps with: {no_data}")
    stages = []
    for name in run.chain:
        stage = run.stages[name]
        if tokens is not None:
            stage = replace(stage, steps=0, tokens=math.ceil(tokens), schedule=ScheduleConfig())
        ranks = hardware.gpus // setting.sequence_parallel
        rehearsal, seconds = None, None
        steps = stage.steps or math.ceil(stage.tokens / (stage.packs_per_step * stage.data.plan.max_tokens))
        if tokenizer is not None and no_data is None:
            sources = open_sources(stage.data, tokenizer, progress=progress)
            check_fit(sources, stage.data)
            rehearsal = rehearse(stage, config, sources, ranks, run.seed, max_packs)
            steps = stage.steps or rehearsal.stage_steps
            if hardware.peak_flops is not None:
                seconds = rehearsal.flops_per_step * steps / (mfu * hardware.peak_flops * hardware.gpus)
        memory = rank_memory(config, stage, run.engine, setting, hardware.gpus)
        accumulation = stage.packs_per_step // ranks
        stages.append(
            StageForecast(name, stage.trainable, steps, stage.packs_per_step, accumulation, memory, rehearsal, seconds)
        )
    wanted = [run.stages[name] for name in run.chain]
    packs = [stage.packs_per_step for stage in wanted]
    possible = list(candidates(setting, config.text.num_attention_heads, hardware.gpus, packs))
    return Forecast(
        run, config, hardware, mfu, setting, stages, no_data,
        choose(config, wanted, run.engine, hardware, possible),
        fewest_gpus(config, wanted, run.engine, hardware, setting),
    )  # fmt: skip


def check_ranks(run: RunConfig, gpus: int) -> None:
    """Raise ConfigError where this many ranks could not run these stages."""
    split = run.engine.sequence_parallel
    if gpus % split:
        raise ConfigError(f"engine.sequence_parallel={split} does not divide --gpus {gpus}; change one of them")
    ranks = gpus // split
    for name in run.chain:
        packs = run.stages[name].packs_per_step
        if packs % ranks:
            near = [number for number in range(1, packs + 1) if packs % number == 0]
            raise ConfigError(
                f"stages.{name}.packs_per_step={packs} is not a multiple of the {ranks} rank(s) of --gpus {gpus}: each "
                f"takes the same number of packs; use --gpus {split * max(n for n in near if n <= max(1, ranks))}, or "
                f"packs_per_step={-(-packs // ranks) * ranks}"
            )


def why_no_data(run: RunConfig) -> str | None:
    """What keeps the data from being looked at, in words; None where shards and tokenizer are there."""
    if NOT_GIVEN in (run.data.root, run.data.tokenizer):
        return "no shards at hand: data.root and data.tokenizer are not both given"
    if run.data.demo is not None and not (Path(run.data.tokenizer) / "tokenizer.json").is_file():
        return f"no shards at hand: {run.data.root} is generated by the first run"
    streamed = [name for name in run.chain if run.stages[name].data.reader != "index"]
    if streamed:
        return f"stage {', '.join(streamed)} streams its shards, whose lengths are not known before (data.reader)"
    return None


def sized_model(run: RunConfig, tokenizer: TextTokenizer | None) -> ModelConfig:
    """The model with its vocabulary: the configured one, the tokenizer's, or that of the demo to be generated.

    Raises:
        ConfigError: none of them states it, or the model's is smaller than the tokenizer's.
    """
    text = run.model.config.text
    known = tokenizer.vocab_size if tokenizer else run.data.demo.vocab_size if run.data.demo else 0
    size = text.vocab_size or known
    if not size or size < known:
        raise ConfigError(
            f"model.config.text.vocab_size={text.vocab_size}: 0 follows the tokenizer, which "
            f"{'is not given' if not known else f'has {known} entries'}; set data.tokenizer or the vocabulary's size"
        )
    return replace(run.model.config, text=replace(text, vocab_size=size))


def as_json(plan: Forecast) -> dict[str, Any]:
    """Everything, for machines. Bytes, seconds, FLOPs; shares between 0 and 1."""
    return {
        "model": {"parameters": parameter_counts(plan.model), "vocab_size": plan.model.text.vocab_size},
        "hardware": asdict(plan.hardware) | {"usable_bytes": plan.hardware.usable_bytes},
        "mfu": plan.mfu,
        "setting": asdict(plan.setting),
        "no_data": plan.no_data,
        "stages": {stage.name: _stage_json(stage) for stage in plan.stages},
        "fits": plan.fits,
        "needed_bytes": plan.needed_bytes,
        "choices": [asdict(choice) for choice in plan.choices],
        "best": asdict(plan.best.setting) if plan.best else None,
        "fewest_gpus_without_offload": plan.fewest_gpus,
    }


def _stage_json(stage: StageForecast) -> dict[str, Any]:
    found: dict[str, Any] = {
        "trainable": list(stage.trainable),
        "steps": stage.steps,
        "packs_per_step": stage.packs_per_step,
        "accumulation": stage.accumulation,
        "memory": as_dict(stage.memory),
        "seconds": stage.seconds,
        "tokens": stage.tokens,
        "data": None,
    }
    rehearsal = stage.rehearsal
    if rehearsal is not None:
        data = asdict(rehearsal)
        data |= {"tokens_per_step": rehearsal.tokens_per_step, "flops_per_step": rehearsal.flops_per_step}
        for source, written in zip(rehearsal.sources, data["sources"], strict=True):
            written["epochs"] = rehearsal.epochs(source, stage.steps)
        found["data"] = data
    return found
