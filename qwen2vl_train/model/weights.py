"""Weights in and out: random initial values, Hugging Face folders, whole models or ZeRO-3 partitions.

Enters: safetensors (one file or a sharded index; `visual.*`/`model.*` names or the nesting of transformers 5.x), or a
seed. Leaves: filled parameters, tensor by tensor: no process ever holds a second copy of the model. Out: safetensors
shards with an index and the flat published `config.json`. Names that do not match are errors, never skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipelines.errors import MissingFileError, UserError
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.parts import part_of
from qwen2vl_train.model.qwen2vl import Qwen2VL

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# transformers 5.x nests the two halves under `model.`
_NESTED = (("model.visual.", "visual."), ("model.language_model.", "model."))
_WRITES_RESIDUAL = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "attn.proj.weight", "mlp.fc2.weight")


class TensorSource(Protocol):
    """Named tensors that can be read by ranges of their flattened elements."""

    def names(self) -> Collection[str]:
        """Every tensor's name, as this model names it."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of the flattened tensor, any dtype, on the CPU."""
        ...


class InitialValues:
    """Random initial values, each a function of (seed, name) alone: the same for any world size, order or device.

    Weights are normal with standard deviation `std` (None: the configuration's `initializer_range`; published sizes
    use 0.02, width 128 learns about five times faster with 0.06: 0.02 * sqrt(1280 / width) fits both). Biases are
    0, norms 1. `residual_scaling` divides the matrices that write into the residual stream by sqrt(2 x depth).
    """

    def __init__(self, model: Qwen2VL, seed: int, std: float | None = None, residual_scaling: bool = False) -> None:
        self.config = model.config
        self.seed = seed
        self.std = std
        self.residual_scaling = residual_scaling
        self.shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}

    def names(self) -> Collection[str]:
        """Every parameter's name."""
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1; makes the whole tensor for a moment, so that any split gives the same numbers."""
        if len(self.shapes[name]) == 1:
            return torch.full((stop - start,), 0.0 if name.endswith(".bias") else 1.0)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.empty(math.prod(self.shapes[name])).normal_(0.0, self._std(name), generator=generator)[start:stop]

    def _std(self, name: str) -> float:
        std = self.config.initializer_range if self.std is None else self.std
        if not self.residual_scaling or not name.endswith(_WRITES_RESIDUAL):
            return std
        is_text = part_of(name) == "llm"
        depth = self.config.text.num_hidden_layers if is_text else self.config.vision.depth
        return std / math.sqrt(2 * depth)


class HuggingFaceFolder:
    """A folder with `model.safetensors` or a sharded index. Reads only what is asked for.

    Raises MissingFileError where neither is there, UserError where the index names a file that is not.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = _locate(self.folder)
        self._handles: dict[Path, Any] = {}
        self._stored = {_plain_name(stored): (path, stored) for stored, path in self._files.items()}

    def names(self) -> Collection[str]:
        """Every stored tensor's name, without the nesting of transformers 5.x."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored tensor's shape."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1, read by whole rows of the first dimension and cut."""
        part = self._slice(name)
        shape = part.get_shape()
        if not shape or 0 in shape:
            raise UserError(f"{self.folder}: tensor {name} has shape {shape}")
        row = math.prod(shape[1:])
        first, last = start // row, -(-stop // row)
        tensor: Tensor = part[first:last].reshape(-1)
        return tensor[start - first * row : stop - first * row]

    def _slice(self, name: str) -> Any:
        path, stored = self._stored[name]
        if path not in self._handles:
            self._handles[path] = _open(path)
        return self._handles[path].get_slice(stored)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, partitioned (ZeRO-3 keeps it in `ds_shape`) or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def initialise(
    model: Qwen2VL, seed: int, std: float | None = None, residual_scaling: bool = False, rank: int = 0
) -> None:
    """Fill a plain or partitioned model with `InitialValues`."""
    load(model, InitialValues(model, seed, std, residual_scaling), rank)


def load_hf(model: Qwen2VL, folder: str | Path, rank: int = 0) -> None:
    """Fill a plain or partitioned model from a Hugging Face folder. Errors as `load` and `HuggingFaceFolder`."""
    load(model, HuggingFaceFolder(folder), rank, f"the weights in {folder}")


def load(model: Qwen2VL, source: TensorSource, rank: int = 0, what: str = "weights") -> None:
    """Fill every parameter from `source`, tensor by tensor; an error calls it `what`.

    A parameter partitioned by ZeRO-3 (built under `zero.Init`, before `deepspeed.initialize`) takes the elements of
    partition `rank` only, so a process reads and holds its share of the model and nothing else.

    Raises ValueError listing missing, unexpected and misshaped tensors; no parameter is changed then. `lm_head.weight`
    is dropped by rule where the model ties it to the embeddings.
    """
    parameters = dict(model.named_parameters())
    _check_names(model.config, parameters, source, what)
    fill(parameters, source, rank)


def fill(parameters: Mapping[str, nn.Parameter], source: TensorSource, rank: int = 0) -> None:
    """Copy what `source` has under each name into that parameter, as `load` does."""
    for name, parameter in parameters.items():
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            values = source.read(name, 0, parameter.numel())
            parameter.data.copy_(values.view(parameter.shape))
        else:
            # every rank's partition has ds_numel elements; the last one is padded
            size, total = part.ds_numel, math.prod(full_shape(parameter))
            start, stop = min(rank * size, total), min((rank + 1) * size, total)
            if stop > start:
                part.data.view(-1)[: stop - start].copy_(source.read(name, start, stop))


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A plain model's parameters, each once (a tied output matrix is left out), for `save_hf`."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def save_hf(
    tensors: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 4 << 30,
    write: bool = True,
) -> None:
    """Write safetensors shards, their index and `config.json` into `folder` (made if absent).

    `tensors` is consumed one by one, so gathering them from partitions needs room for one shard. Ranks that only take
    part in the gathering pass write=False. One shard is called `model.safetensors` and has no index.
    """
    folder = Path(folder)
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}.partial", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors:
        if not write:
            continue
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if pending and sum(held.nbytes for held in pending.values()) + stored.nbytes > max_shard_bytes:
            flush()
        # a caller's tensor may be overwritten by the next one it yields
        pending[name] = stored.clone() if stored.data_ptr() == tensor.data_ptr() else stored
    if not write:
        return
    flush()
    _name_shards(folder, shards)
    named = json.dumps(config.to_hf(str(dtype).removeprefix("torch.")), indent=2)
    (folder / "config.json").write_text(named + "\n", encoding="utf-8")


def _plain_name(stored: str) -> str:
    for prefix, plain in _NESTED:
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored


def _locate(folder: Path) -> dict[str, Path]:
    """Stored tensor name -> file."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # only the last component: an index cannot point out of its folder
        files = {name: folder / Path(file).name for name, file in weight_map.items()}
        absent = sorted({path.name for path in files.values() if not path.is_file()})
        if absent:
            raise UserError(f"{index}: shards missing: {', '.join(absent)}")
        return files
    single = folder / SINGLE_NAME
    if not single.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        remedy = (
            f"{', '.join(pickled[:3])} is not read, since a pickle can run code: save the model as safetensors, with "
            "transformers' save_pretrained"
            if pickled
            else "name a folder with weights in safetensors"
        )
        raise MissingFileError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} found; {remedy}")
    with _open(single) as handle:
        return dict.fromkeys(handle.keys(), single)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise UserError(f"{path} ({size:,} bytes) is no whole safetensors file: {error}; copy it again") from error


def _check_names(config: ModelConfig, parameters: dict[str, nn.Parameter], source: TensorSource, what: str) -> None:
    offered = set(source.names()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    problems = [f"missing {name}" for name in sorted(parameters.keys() - offered)]
    problems += [f"unexpected {name}" for name in sorted(offered - parameters.keys())]
    for name in sorted(offered & parameters.keys()):
        found, wanted = source.shape(name), full_shape(parameters[name])
        if found != wanted:
            problems.append(f"{name} has shape {list(found)}, the model wants {list(wanted)}")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{what} do not fit the model: {shown}")


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards their published names, which contain their number; remove those of an earlier, longer export."""
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE_NAME]
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / SINGLE_NAME, folder / INDEX_NAME):
        stale.unlink(missing_ok=True)
    for number, name in enumerate(names):
        (folder / f"shard-{number}.partial").rename(folder / name)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
            "weight_map": {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard},
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
