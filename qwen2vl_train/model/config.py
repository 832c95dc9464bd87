"""Sizes of a Qwen2-VL model: read from and written to the published `config.json`.

Enters: a published (flat) or transformers 5.x (nested) configuration. Leaves: frozen dataclasses that the model is
built from, or the flat published form, which transformers 4.45 to 5.x, vLLM and SGLang read.
Dropped: keys that do not change the model (`use_cache`, ...). Refused: what this model does not compute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from data_pipelines.config import Positions
from data_pipelines.errors import UserError
from data_pipelines.samples import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from data_pipelines.tokenizer import SpecialTokens

NUM_CHANNELS = 3


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer (Qwen2-VL paper, section 2.1); `embed_dim` is its width, defaults as published.

    Raises ValueError where heads do not divide the width or the head size is no multiple of 4 (2D-RoPE gives each of
    rows and columns half of the rotated pairs).
    """

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: int = 4
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise UserError(f"vision: embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.head_dim % 4:
            raise UserError(f"vision: head size {self.head_dim} is not a multiple of 4, which 2D-RoPE needs")

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return self.embed_dim * self.mlp_ratio


@dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder.

    `mrope_section` counts the rotated pairs that follow time, row and column; it sums to head_dim / 2.
    Raises ValueError where heads or sections do not fit.
    """

    vocab_size: int = 151_936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 32_768

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"text: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"text: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise UserError(
                f"text: mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, "
                f"half of the head size {self.head_dim} is needed"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. Token ids are the tokenizer's; `initializer_range` is the standard deviation of random weights.

    `vision_token_id` is published but read by nothing here; None leaves it out (a tokenizer without <|vision_pad|>).
    `positions` "1d" counts tokens, the ablation of the paper's table 8. `config.json` keeps it under `positions`, which
    only this program reads: others give such a model M-RoPE positions.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int = 151_643
    eos_token_id: int = 151_645
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    vision_token_id: int | None = 151_654
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    positions: Positions = "mrope"

    def with_token_ids(self, special: SpecialTokens) -> ModelConfig:
        """The same model for a tokenizer whose special tokens have the ids `special`."""
        return replace(
            self,
            bos_token_id=special.endoftext,
            eos_token_id=special.im_end,
            vision_start_token_id=special.vision_start,
            vision_end_token_id=special.vision_end,
            image_token_id=special.image_pad,
            video_token_id=special.video_pad,
        )

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Read a `config.json` (its path, its folder, or its content), flat or nested.

        Raises ValueError naming the key where the configuration describes something this model does not compute
        (another model type, activation, patch size, sliding window, rope scaling), or leaves out a size.
        """
        values = _read(source)
        if values.get("model_type") != "qwen2_vl":
            raise UserError(f"model_type is {values.get('model_type')!r}; only 'qwen2_vl' is read here")
        text = {**values, **(values.get("text_config") or {})}
        vision = values.get("vision_config") or {}
        _refuse_unsupported(text, vision)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        hidden_size = _need(text, "hidden_size")
        if vision.get("hidden_size", hidden_size) != hidden_size:
            raise UserError(f"vision_config.hidden_size {vision['hidden_size']} differs from hidden_size {hidden_size}")
        section = rope.get("mrope_section", TextConfig.mrope_section)
        return cls(
            vision=VisionConfig(
                depth=vision.get("depth", VisionConfig.depth),
                embed_dim=vision.get("embed_dim", VisionConfig.embed_dim),
                num_heads=vision.get("num_heads", VisionConfig.num_heads),
                mlp_ratio=int(vision.get("mlp_ratio", VisionConfig.mlp_ratio)),
            ),
            text=TextConfig(
                vocab_size=_need(text, "vocab_size"),
                hidden_size=hidden_size,
                intermediate_size=_need(text, "intermediate_size"),
                num_hidden_layers=_need(text, "num_hidden_layers"),
                num_attention_heads=_need(text, "num_attention_heads"),
                num_key_value_heads=_need(text, "num_key_value_heads"),
                rms_norm_eps=text.get("rms_norm_eps", TextConfig.rms_norm_eps),
                rope_theta=float(text.get("rope_theta", rope.get("rope_theta", TextConfig.rope_theta))),
                mrope_section=(int(section[0]), int(section[1]), int(section[2])),
                max_position_embeddings=text.get("max_position_embeddings", TextConfig.max_position_embeddings),
            ),
            tie_word_embeddings=bool(values.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)),
            initializer_range=text.get("initializer_range", cls.initializer_range),
            positions=values.get("positions", cls.positions),
            **{name: text[name] if text.get(name) is not None else getattr(cls, name) for name in _TOKEN_IDS},
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The flat published `config.json`. `dtype` ("bfloat16", "float32", ...) names the stored tensors' type."""
        text = asdict(self.text)
        section = list(text.pop("mrope_section"))
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "attention_dropout": 0.0,
            **{name: value for name in _TOKEN_IDS if (value := getattr(self, name)) is not None},
            "hidden_act": "silu",
            "initializer_range": self.initializer_range,
            "model_type": "qwen2_vl",
            **text,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            **({} if self.positions == "mrope" else {"positions": self.positions}),
            "sliding_window": self.text.max_position_embeddings,
            "max_window_layers": self.text.num_hidden_layers,
            "use_sliding_window": False,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": self.vision.depth,
                "embed_dim": self.vision.embed_dim,
                "mlp_ratio": self.vision.mlp_ratio,
                "num_heads": self.vision.num_heads,
                "hidden_size": self.text.hidden_size,
                "hidden_act": "quick_gelu",
                "in_channels": NUM_CHANNELS,
                "in_chans": NUM_CHANNELS,
                "patch_size": PATCH_SIZE,
                "spatial_patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE_SIZE,
                "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            },
        }


_TOKEN_IDS = (
    "bos_token_id",
    "eos_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "image_token_id",
    "video_token_id",
)


def _read(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    values: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a JSON object is expected, found {type(values).__name__}")
    return values


def _need(values: Mapping[str, Any], name: str) -> int:
    if not isinstance(values.get(name), int):
        raise UserError(f"config.json: {name} is {values.get(name)!r}, an integer is needed")
    return int(values[name])


def _refuse_unsupported(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that would make this code compute something else than the checkpoint's model."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    checks: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("use_sliding_window", bool(text.get("use_sliding_window", False)), (False,)),
        ("rope_scaling.type", rope_type, ("mrope", "default")),
        ("positions", text.get("positions", "mrope"), get_args(Positions)),
        ("vision_config.hidden_act", vision.get("hidden_act", "quick_gelu"), ("quick_gelu",)),
        ("vision_config.in_channels", vision.get("in_channels", vision.get("in_chans", NUM_CHANNELS)), (NUM_CHANNELS,)),
        ("vision_config.patch_size", vision.get("patch_size", PATCH_SIZE), (PATCH_SIZE,)),
        ("vision_config.spatial_merge_size", vision.get("spatial_merge_size", MERGE_SIZE), (MERGE_SIZE,)),
        (
            "vision_config.temporal_patch_size",
            vision.get("temporal_patch_size", TEMPORAL_PATCH_SIZE),
            (TEMPORAL_PATCH_SIZE,),
        ),
    ]
    for name, value, allowed in checks:
        if value not in allowed:
            raise UserError(
                f"config.json: {name} is {value!r}; this model computes only {', '.join(map(repr, allowed))}"
            )
