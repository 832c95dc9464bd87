"""A run's configuration as frozen dataclasses: every key, its default, its unit and what contradicts it.

Made by `overrides.load_config` from YAML and the command line. Beyond these nothing reads a dict or a default.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

from pydantic import ConfigDict, with_config

from data_pipelines.config import DataConfig
from data_pipelines.errors import UserError
from qwen2vl_train.model.config import ModelConfig

Part = Literal["vit", "merger", "llm"]


class ConfigError(UserError):
    """A configuration that cannot run. The message names the key, its value and what to do."""


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of each part. A part that does not train in the stage needs none."""

    vit: float = 0.0
    merger: float = 0.0
    llm: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """`vit_layer_decay` multiplies a ViT block's rate once per block above it (Qwen-VL used 0.95; 1 is off).

    `clip_norm` bounds the global gradient norm (0: no clipping). `name` "sgd" (no momentum) is for comparisons: AdamW
    amplifies the rounding of near-zero gradients.
    """

    lr: LearningRates
    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    vit_layer_decay: float = 1.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        rates = {part: getattr(self.lr, part) for part in ("vit", "merger", "llm")}
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates.values()):
            raise ValueError(f"lr={rates}: learning rates are finite and not negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} are outside [0, 1)")
        if not 0 < self.vit_layer_decay <= 1:
            raise ValueError(f"vit_layer_decay={self.vit_layer_decay} is outside (0, 1]; 1 switches the decay off")
        _finite(clip_norm=self.clip_norm, weight_decay=self.weight_decay, eps=self.eps)
        if not self.eps:
            raise ValueError("eps=0 lets AdamW divide by 0 where a gradient was always 0; 1e-6 is the default")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then `kind` down to `min_ratio` times the peak at the stage's end.

    The warm-up is in the unit of the stage's length: `warmup_steps` where it has `steps`, `warmup_tokens` for `tokens`.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_ratio: float = 0.1
    warmup_tokens: int = 0

    def __post_init__(self) -> None:
        _at_least(0, warmup_steps=self.warmup_steps, warmup_tokens=self.warmup_tokens)
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio={self.min_ratio} is outside [0, 1]: it is a share of the peak rate")


@dataclass(frozen=True)
class StageConfig:
    """One stage: what trains, on what, for how long.

    Its length is `steps`, or, with `steps` 0, the first step at which it has trained `tokens` (all of a pack's, media
    included), and the schedule then follows the tokens.
    `packs_per_step` is the global batch: packs per optimizer step over all ranks and micro-steps; it must be a multiple
    of the world size (of its groups under `engine.sequence_parallel`). `init_from`: "previous" (the export of the stage
    before), "scratch" (seeded random weights), or the path of a Hugging Face folder. `evaluate` scores the held-out
    sets at the stage's end.
    """

    trainable: tuple[Part, ...]
    steps: int
    packs_per_step: int
    optim: OptimConfig
    data: DataConfig
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init_from: str = "previous"
    evaluate: bool = True
    tokens: int = 0

    def __post_init__(self) -> None:
        if not self.trainable:
            raise ValueError("trainable is empty: name at least one of vit, merger, llm")
        _at_least(0, steps=self.steps, tokens=self.tokens)
        _at_least(1, packs_per_step=self.packs_per_step)
        if bool(self.steps) == bool(self.tokens):
            raise ValueError(
                f"steps={self.steps}, tokens={self.tokens}: a stage has one length; set one of them and the other to 0"
            )
        unit, other = ("tokens", "steps") if self.tokens else ("steps", "tokens")
        warmup = getattr(self.schedule, f"warmup_{unit}")
        if warmup >= self.length:
            raise ValueError(f"schedule.warmup_{unit}={warmup} leaves nothing of {unit}={self.length}; lower it")
        if stray := getattr(self.schedule, f"warmup_{other}"):
            raise ValueError(
                f"schedule.warmup_{other}={stray} in a stage of {unit}={self.length}: set it to 0 and "
                f"schedule.warmup_{unit} instead"
            )
        for part in self.trainable:
            if getattr(self.optim.lr, part) <= 0:
                raise ValueError(f"{part} is trainable but optim.lr.{part} is not positive; set it")

    @property
    def length(self) -> int:
        """Of the stage, in tokens if it has `tokens`, else in steps."""
        return self.tokens or self.steps


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed's part. Sizes count elements; offload keeps optimizer state (or parameters too) in host memory.

    `timeout_s` bounds every collective: ranks that wait longer for another one end the run; `meeting_s` bounds the wait
    until all ranks have come, at the start. `sequence_parallel` neighbouring ranks share one pack; it divides the
    number of ranks and the decoder's attention heads.
    """

    zero_stage: Literal[0, 1, 2, 3] = 3
    precision: Literal["fp32", "bf16"] = "bf16"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    param_persistence_threshold: int = 100_000
    prefetch_bucket_size: int = 50_000_000
    reduce_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    overlap_comm: bool = True
    timeout_s: float = 5400.0
    sequence_parallel: int = 1
    meeting_s: float = 600.0

    def __post_init__(self) -> None:
        _at_least(1, sequence_parallel=self.sequence_parallel, reduce_bucket_size=self.reduce_bucket_size)
        _at_least(
            0,
            param_persistence_threshold=self.param_persistence_threshold,
            prefetch_bucket_size=self.prefetch_bucket_size,
            max_live_parameters=self.max_live_parameters,
        )
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s={self.timeout_s} must be above 0 and finite: it bounds every collective")
        if not 0 < self.meeting_s < math.inf:
            raise ValueError(
                f"meeting_s={self.meeting_s} must be above 0 and finite: for so long ranks wait for others"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters=true needs zero_stage=3, not {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer=true needs zero_stage=1, 2 or 3: stage 0 partitions no optimizer state")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision=bf16 with zero_stage=0 would accumulate gradients in bf16; choose zero_stage=1, 2 or 3 "
                "(float32 master weights and gradients), or precision=fp32"
            )


@dataclass(frozen=True)
class ModelSettings:
    """The model's shape (`config`) and how it runs: attention backend, activation checkpointing, compilation.

    `*_checkpointing` n recomputes every n-th block in the backward pass (0: none). `compile` compiles what each ViT and
    decoder block computes by torch.compile's backend of that name, for all lengths at once ("aot_eager": traced only).
    `config.text.vocab_size` 0 takes the tokenizer's size.
    """

    config: ModelConfig
    attention: Literal["auto", "varlen", "reference"] = "auto"
    vision_checkpointing: int = 0
    text_checkpointing: int = 0
    compile: Literal["none", "inductor", "aot_eager"] = "none"

    def __post_init__(self) -> None:
        _at_least(0, vision_checkpointing=self.vision_checkpointing, text_checkpointing=self.text_checkpointing)


@dataclass(frozen=True)
class DemoData:
    """Settings of the generated demo set; built into `data.root` when it is not there yet."""

    num_pictures: int = 20000
    num_clips: int = 4000
    num_texts: int = 10000
    num_heldout: int = 200
    vocab_size: int = 2048
    seed: int = 0  # of the data alone: another seed of the run trains on the same pictures


@dataclass(frozen=True)
class DataSettings:
    """What the stages share: where shards and tokenizer lie, budgets, mixtures by stage, held-out sets by task.

    `demo` not null: the shards (and the tokenizer) are generated on first use. `heldout` maps a task to its shards.
    """

    root: str
    tokenizer: str
    heldout: dict[str, str] = field(default_factory=dict)
    demo: DemoData | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at a stage's end (0: only there).

    The last `keep` stay, and each whose step is a multiple of `keep_every` (0: none). One that would leave less than
    `min_free_gb` GB of its disk free is left out with a warning. `asynchronous` goes on training while one is written,
    from a copy in host memory.
    """

    every: int = 500
    keep: int = 2
    keep_every: int = 0
    min_free_gb: float = 1.0
    asynchronous: bool = False

    def __post_init__(self) -> None:
        _at_least(0, every=self.every, keep_every=self.keep_every)
        _at_least(1, keep=self.keep)
        _finite(min_free_gb=self.min_free_gb)


@dataclass(frozen=True)
class GuardConfig:
    """When to give up: updates left out because loss or gradients were not finite, in a row and in a stage.

    A step whose loss lies more than `spike_sigma` standard deviations (0: not looked at) over the mean of the last
    `spike_window` steps takes the stage back to its last checkpoint and on with the packs after the spike, up to
    `max_rollbacks` times.
    """

    max_skipped_in_row: int = 5
    max_skipped: int = 100
    spike_sigma: float = 0.0
    spike_window: int = 128
    max_rollbacks: int = 10

    def __post_init__(self) -> None:
        _at_least(0, max_rollbacks=self.max_rollbacks)
        _at_least(1, max_skipped_in_row=self.max_skipped_in_row, max_skipped=self.max_skipped)
        _at_least(2, spike_window=self.spike_window)
        if not 0 <= self.spike_sigma < math.inf:
            raise ValueError(f"spike_sigma={self.spike_sigma} must be finite and not negative; 0 switches it off")


@dataclass(frozen=True)
class WatchdogConfig:
    """A rank that makes no progress for `stall_s` seconds is named and the run ends; 0: no rank counts as stalled.

    What lies outside the steps may take `save_s` seconds a piece: loading the model, writing a checkpoint or the
    export, one held-out set. Both lie below `engine.timeout_s`, after which the process group ends the run without
    saying why.
    """

    stall_s: float = 900.0
    save_s: float = 3600.0

    def __post_init__(self) -> None:
        if not (self.stall_s >= 0 and self.save_s > 0):
            raise ValueError(f"stall_s={self.stall_s} must not be negative and save_s={self.save_s} must be above 0")


@dataclass(frozen=True)
class MonitorConfig:
    """`wandb`: "auto" is online when an API key is set, else offline; never a prompt. `log_every` in steps."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "qwen2vl-train"
    log_every: int = 10

    def __post_init__(self) -> None:
        _at_least(1, log_every=self.log_every)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out scoring at a stage's end by greedy generation. `max_samples` per task; `pictures` shown per task."""

    max_samples: int = 200
    max_new_tokens: int = 64
    batch_size: int = 64
    pictures: int = 6

    def __post_init__(self) -> None:
        _at_least(1, max_samples=self.max_samples, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        _at_least(0, pictures=self.pictures)


@with_config(ConfigDict(extra="forbid"))  # the nested dataclasses inherit it
@dataclass(frozen=True)
class RunConfig:
    """A whole run: the chain of stages and everything they share. `chain` names the stages to run, in order.

    `data_change` "accept" lets a begun stage go on with other weights, sources or shards, and says what restarts.
    """

    run_dir: str
    seed: int
    chain: tuple[str, ...]
    stages: dict[str, StageConfig]
    model: ModelSettings
    data: DataSettings
    engine: EngineConfig
    checkpoint: CheckpointConfig
    monitor: MonitorConfig
    evaluation: EvaluationConfig
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    resume: str = "auto"
    data_change: Literal["error", "accept"] = "error"
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        unknown = [name for name in self.chain if name not in self.stages]
        if unknown or not self.chain:
            raise ValueError(f"chain={list(self.chain)}: choose from the configured stages {list(self.stages)}")
        if len(set(self.chain)) < len(self.chain):
            raise ValueError(f"chain={list(self.chain)} names a stage twice; each runs once, from the export before it")
        if not self.run_dir.strip():
            raise ValueError("run_dir is empty: name a folder for the run, such as run_dir=runs/first")
        if self.model.compile != "none" and self.engine.sequence_parallel > 1:
            raise ValueError(
                f"model.compile={self.model.compile} with engine.sequence_parallel={self.engine.sequence_parallel}: "
                "blocks whose rows travel between ranks are not compiled; set model.compile=none or sequence_parallel=1"
            )
        for name, stage in self.stages.items():
            if stage.data.positions != self.model.config.positions:
                raise ValueError(
                    f"stages.{name}.data.positions={stage.data.positions}, model.config.positions="
                    f"{self.model.config.positions}: a model answers with the positions it was trained with; set "
                    "model.config.positions, which the stages follow"
                )
        for name, limit_s in asdict(self.watchdog).items():
            if self.watchdog.stall_s and limit_s >= self.engine.timeout_s:
                raise ValueError(
                    f"watchdog.{name}={limit_s:g} is not below engine.timeout_s={self.engine.timeout_s:g}, at which "
                    "waiting ranks would end the run before the watchdog says for whom; raise engine.timeout_s or "
                    f"lower watchdog.{name}"
                )
        if self.guard.spike_sigma and not self.checkpoint.every:
            raise ValueError(
                f"guard.spike_sigma={self.guard.spike_sigma} goes back to a checkpoint, and checkpoint.every=0 writes "
                "none before a stage's end; set checkpoint.every"
            )


def _finite(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be finite and not negative")


def _at_least(limit: int, **values: int) -> None:
    for name, value in values.items():
        if value < limit:
            raise ValueError(f"{name}={value} must be at least {limit}")
