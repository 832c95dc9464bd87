"""A new model from its parts: a Qwen2 text checkpoint, an open_clip ViT-H/14 (DFN), a random merger.

Enters: a Hugging Face folder of Qwen2, a CLIP state dict of open_clip, a seed. Leaves: a `TensorSource` for
`weights.load`, which fills a whole model or ZeRO-3 partitions, and an account of every tensor: loaded, dropped by rule,
or initialised. Anything else is an error with its name.

Mapping (the paper replaces CLIP's fixed positions by 2D-RoPE; the rest follows from the shapes):
- `conv1` (one frame) becomes the 3D kernel halved and repeated over two frames: a still image gives the same product.
- `attn.in_proj_*` is qkv as it is; `ln_1`, `c_fc`, ... are renamed.
- class token, absolute positions, norms before and after the transformer, projection and text tower are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.samples import TEMPORAL_PATCH_SIZE
from qwen2vl_train.model.parts import part_of
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import HuggingFaceFolder, InitialValues, load

_CONVOLUTION = "visual.conv1.weight"
_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_DROPPED_VISION = re.compile(
    r"visual\.(class_embedding|positional_embedding|proj|ln_pre\.(weight|bias)|ln_post\.(weight|bias))"
)
# CLIP's text tower, at the top level or under `text.`, and its temperature
_DROPPED_TEXT = re.compile(
    r"(text\.)?(positional_embedding|text_projection|token_embedding\.weight|ln_final\.(weight|bias)|attn_mask"
    r"|transformer\.resblocks\.\d+\..+)|logit_scale|logit_bias"
)


@dataclass(frozen=True)
class Account:
    """What became of every tensor, by its name in the file (`loaded`, `dropped`) or in the model (`initialised`)."""

    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    initialised: tuple[str, ...]

    def summary(self) -> str:
        """One line for the log."""
        return f"{len(self.loaded)} tensors loaded, {len(self.dropped)} dropped, {len(self.initialised)} initialised"


class CombinedParts:
    """The parts as one `TensorSource` under this model's names.

    Raises ValueError listing every tensor of the files that no rule covers.
    """

    def __init__(self, model: Qwen2VL, text_folder: str | Path, vision_file: str | Path, seed: int) -> None:
        self._text = HuggingFaceFolder(text_folder)
        self._vision = _read_state(Path(vision_file))
        self._random = InitialValues(model, seed)
        self._vision_names: dict[str, str] = {}
        dropped, unknown = [], []
        for stored in self._vision:
            name = _vision_name(stored)
            if name is not None:
                self._vision_names[name] = stored
            elif _DROPPED_VISION.fullmatch(stored) or _DROPPED_TEXT.fullmatch(stored):
                dropped.append(stored)
            else:
                unknown.append(f"{vision_file}: {stored}")
        self._text_names = {name for name in self._text.names() if _is_text(name)}
        unknown += [f"{text_folder}: {name}" for name in self._text.names() if name not in self._text_names]
        if unknown:
            raise UserError(f"no rule for these tensors: {'; '.join(sorted(unknown)[:20])}")
        if model.config.tie_word_embeddings and "lm_head.weight" in self._text_names:
            self._text_names.remove("lm_head.weight")
            dropped.append("lm_head.weight")
        self._merger_names = {name for name in self._random.names() if part_of(name) == "merger"}
        self.account = Account(
            loaded=(*sorted(self._vision_names.values()), *sorted(self._text_names)),
            dropped=tuple(sorted(dropped)),
            initialised=tuple(sorted(self._merger_names)),
        )

    def names(self) -> Collection[str]:
        """Names as in the model."""
        return self._vision_names.keys() | self._text_names | self._merger_names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape after mapping."""
        if name in self._vision_names:
            return tuple(self._vision_tensor(name).shape)
        return self._text.shape(name) if name in self._text_names else self._random.shape(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 after mapping."""
        if name in self._vision_names:
            return self._vision_tensor(name).reshape(-1)[start:stop]
        return (self._text if name in self._text_names else self._random).read(name, start, stop)

    def _vision_tensor(self, name: str) -> Tensor:
        stored = self._vision[self._vision_names[name]]
        return inflate(stored) if self._vision_names[name] == _CONVOLUTION else stored


def load_from_parts(
    model: Qwen2VL, text_folder: str | Path, vision_file: str | Path, seed: int, rank: int = 0
) -> Account:
    """Fill a plain or partitioned model from its parts; says what became of every tensor. Errors as `weights.load`."""
    source = CombinedParts(model, text_folder, vision_file, seed)
    load(model, source, rank)
    return source.account


def inflate(kernel: Tensor) -> Tensor:
    """A 2D patch kernel [W, 3, 14, 14] over two frames, [W, 3, 2, 14, 14], with the same result on a still image."""
    return (kernel / TEMPORAL_PATCH_SIZE).unsqueeze(2).repeat(1, 1, TEMPORAL_PATCH_SIZE, 1, 1)


def _is_text(name: str) -> bool:
    try:
        return part_of(name) == "llm"
    except ValueError:
        return False


def _vision_name(stored: str) -> str | None:
    """This model's name of an open_clip tensor; None for one that is not kept."""
    if stored == _CONVOLUTION:
        return "visual.patch_embed.proj.weight"
    match = _BLOCK.fullmatch(stored)
    if match is None or match.group(2) not in _IN_BLOCK:
        return None
    return f"visual.blocks.{match.group(1)}.{_IN_BLOCK[match.group(2)]}"


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file (memory-mapped; nothing but tensors is unpickled)."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; open_clip weights are wanted (.safetensors, .bin or .pt)")
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: a state dict of tensors is expected")
    return {name.removeprefix("module."): value for name, value in state.items()}
