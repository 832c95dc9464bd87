"""Bytes on one rank for the heaviest pack that the budgets allow, and which settings fit a machine.

Enters: a model's sizes, a stage, the engine's settings, the number of ranks. Leaves: `RankMemory`, and `Choice`s from
the fastest to the most frugal. Costs about a millisecond per setting: `model.footprint` counts, nothing is built.

What is counted beside it: under ZeRO-3 the parameters that are gathered at once, the buckets that gradients are reduced
in, and the output matrix's gradient, which lies whole on the rank from the loss to its place in the backward pass.

Offloading takes gradients off the GPU under ZeRO-3 alone (DeepSpeed 0.19.8). Stage 1 keeps all of them until the
update, and in bf16 its own share once more, flat in float32. Stage 2 keeps its share: in bf16 until the update, in
float32 to the end of the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from qwen2vl_train.config import EngineConfig, ModelSettings, StageConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import PackLengths, parameter_counts
from qwen2vl_train.model.footprint import FLOAT32, Running, activation_bytes, state_bytes
from qwen2vl_train.plan.hardware import Hardware

PIXELS_PER_PATCH = 14 * 14
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of a pack's tokens that are media; the heaviest decides


@dataclass(frozen=True)
class Setting:
    """What can be changed to make a run fit."""

    zero_stage: int
    precision: str
    offload_optimizer: bool
    offload_parameters: bool
    vision_checkpointing: int
    text_checkpointing: int
    sequence_parallel: int

    @classmethod
    def of(cls, engine: EngineConfig, model: ModelSettings) -> Setting:
        """The configured one."""
        return cls(
            engine.zero_stage, engine.precision, engine.offload_optimizer, engine.offload_parameters,
            model.vision_checkpointing, model.text_checkpointing, engine.sequence_parallel,
        )  # fmt: skip

    @property
    def words(self) -> str:
        """The overrides that give it."""
        return " ".join(
            [
                f"engine.zero_stage={self.zero_stage}",
                f"engine.offload_optimizer={str(self.offload_optimizer).lower()}",
                f"engine.offload_parameters={str(self.offload_parameters).lower()}",
                f"engine.sequence_parallel={self.sequence_parallel}",
                f"model.vision_checkpointing={self.vision_checkpointing}",
                f"model.text_checkpointing={self.text_checkpointing}",
            ]
        )

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else FLOAT32


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU at the worst moment of a step; `host` is what offloading puts into its share of host memory."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    buckets: int
    activations: int
    host: int

    @property
    def total(self) -> int:
        """On the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.buckets + self.activations


@dataclass(frozen=True)
class Choice:
    """A setting and the most that any stage needs under it."""

    setting: Setting
    bytes: int
    host: int
    fits: bool


def rank_memory(
    config: ModelConfig, stage: StageConfig, engine: EngineConfig, setting: Setting, world: int
) -> RankMemory:
    """What one of `world` ranks needs in `stage` for any pack within its budgets."""
    element = setting.element_bytes
    running = Running(
        element, setting.vision_checkpointing, setting.text_checkpointing, varlen=setting.precision == "bf16"
    )
    state = state_bytes(config, stage.trainable, setting.zero_stage, world, running)
    matrix = config.text.vocab_size * config.text.hidden_size if "llm" in stage.trainable else 0
    # several chunks of logits add their share in float32, which is then rounded to the weights' type
    head = matrix * (element if element == FLOAT32 else element + FLOAT32)
    activations = max(
        activation_bytes(config, lengths, stage.trainable, running).partitioned_peak
        for lengths in heaviest_packs(stage, setting.sequence_parallel)
    )
    trained = sum(count for part, count in parameter_counts(config).items() if part in stage.trainable)
    buckets = 0
    if setting.zero_stage > 0:
        buckets = min(engine.reduce_bucket_size, trained) * FLOAT32 * (2 if engine.overlap_comm else 1)
    gathered = 0
    if setting.zero_stage == 3:
        gathered = min(_live_parameters(config, engine), sum(parameter_counts(config).values())) * element
    gradients, on_host = state.gradients, 0
    if setting.offload_optimizer:
        share = -(-trained // world)
        on_host = share * _offloaded_bytes(setting)
        if setting.zero_stage == 3:
            gradients = 0
        else:
            buckets += matrix * element  # a buffer as large as the largest parameter that trains
        if setting.zero_stage == 1 and element < FLOAT32:
            gradients += share * FLOAT32
    on_host += state.parameters if setting.offload_parameters else 0
    return RankMemory(
        parameters=0 if setting.offload_parameters else state.parameters,
        gradients=gradients,
        optimizer=0 if setting.offload_optimizer else state.optimizer,
        gathered=gathered,
        buckets=buckets,
        activations=activations + head,
        host=on_host,
    )


def _offloaded_bytes(setting: Setting) -> int:
    """Host memory per parameter of a rank's share: float32 master, its gradient and two moments are 16, and more.

    Stage 3 accumulates gradients there. Stages 1 and 2 have a copy of the updated weights on their way back; stage 2
    accumulates gradients there in float32, for which it has no flat tensor on the GPU.
    """
    if setting.zero_stage == 3:
        return 16 + FLOAT32
    accumulates = setting.zero_stage == 2 and setting.element_bytes == FLOAT32
    return 16 + setting.element_bytes + (FLOAT32 if accumulates else 0)


def heaviest_packs(stage: StageConfig, sequence_parallel: int = 1) -> list[PackLengths]:
    """Packs at the budgets' limits with more and more media; of ranks that share a pack, the one with most to hold.

    Tokens are cut evenly; patches between temporal steps, so an image that fills the pack stays on one rank.
    """
    plan, media = stage.data.plan, stage.data.media
    largest = max(media.max_pixels, media.video_max_pixels) // PIXELS_PER_PATCH
    packs = []
    for share in MIXES:
        patches = min(plan.max_patches, 4 * int(share * plan.max_tokens))
        labels = -(-(plan.max_tokens - patches // 4) // sequence_parallel)
        here = min(patches, max(-(-patches // sequence_parallel), largest if sequence_parallel > 1 else 0))
        packs.append(PackLengths((-(-plan.max_tokens // sequence_parallel),), (here,) if here else (), here, 0, labels))
    return packs


def candidates(setting: Setting, heads: int, gpus: int, packs_per_step: Sequence[int]) -> Iterator[Setting]:
    """Settings from the fastest to the most frugal: sharing memory first, then recomputing, splitting, offloading.

    Only those that run: `sequence_parallel` divides heads and GPUs, and the rest of the GPUs every stage's packs.
    """
    splits = [
        split
        for split in (1, 2, 4, 8, 16)
        if heads % split == gpus % split == 0 and all(packs % (gpus // split) == 0 for packs in packs_per_step)
    ]
    stages = (1, 2, 3) if setting.precision == "bf16" else (0, 1, 2, 3)
    for offload_optimizer, offload_parameters in ((False, False), (True, False), (True, True)):
        for split in splits:
            for vision, text in ((0, 0), (0, 1), (1, 1)):
                for zero_stage in stages:
                    if (offload_parameters and zero_stage < 3) or (offload_optimizer and zero_stage == 0):
                        continue
                    yield Setting(
                        zero_stage, setting.precision, offload_optimizer, offload_parameters, vision, text, split
                    )


def choose(
    config: ModelConfig,
    stages: Sequence[StageConfig],
    engine: EngineConfig,
    hardware: Hardware,
    settings: Sequence[Setting],
) -> list[Choice]:
    """Each setting with the memory of the stage that needs most, and whether that fits."""
    choices = []
    for setting in settings:
        needs = [rank_memory(config, stage, engine, setting, hardware.gpus) for stage in stages]
        most = max(need.total for need in needs)
        choices.append(Choice(setting, most, max(need.host for need in needs), most <= hardware.usable_bytes))
    return choices


def fewest_gpus(
    config: ModelConfig, stages: Sequence[StageConfig], engine: EngineConfig, hardware: Hardware, setting: Setting
) -> int | None:
    """The smallest power of two of such GPUs that the most frugal setting fits, up to 4,096; None: none does.

    Without a split of packs, which the number of GPUs would have to agree with, and without offloading.
    """
    frugal = replace(
        setting, zero_stage=3, vision_checkpointing=1, text_checkpointing=1, sequence_parallel=1,
        offload_optimizer=False, offload_parameters=False,
    )  # fmt: skip
    for gpus in (1 << power for power in range(13)):
        if choose(config, stages, engine, replace(hardware, gpus=gpus), [frugal])[0].fits:
            return gpus
    return None


def as_dict(memory: RankMemory) -> dict[str, int]:
    """For JSON."""
    return asdict(memory) | {"total": memory.total}


def common_ranks(packs_per_step: Sequence[int], limit: int = 8) -> int:
    """The largest number of ranks up to `limit` that divides every stage's packs per step."""
    shared = math.gcd(*packs_per_step)
    return max(number for number in range(1, limit + 1) if shared % number == 0)


def _live_parameters(config: ModelConfig, engine: EngineConfig) -> int:
    """The most that ZeRO-3 holds gathered: its limit, or, if more, the largest module and what is prefetched."""
    text, vision = config.text, config.vision
    kv_size = text.num_key_value_heads * text.head_dim
    layer = 2 * text.hidden_size * (text.hidden_size + kv_size) + 3 * text.hidden_size * text.intermediate_size
    block = 4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.mlp_dim
    largest = max(layer, block, text.vocab_size * text.hidden_size)
    return max(engine.max_live_parameters, largest + engine.prefetch_bucket_size)
