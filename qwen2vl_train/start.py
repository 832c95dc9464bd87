"""Whether what a stage starts from, a folder or a checkpoint, holds the model that the run trains.

Enters: a Hugging Face folder or a checkpoint, the run's model and tokenizer. Leaves: a `ConfigError` where the weights
would compute something else than they were trained for, which no tensor's shape shows (a rotary base, an epsilon,
another token under an id). Reads `config.json` and `tokenizer.json` alone, or `state.json`.

Not compared: what changes nothing that is computed (`max_position_embeddings`, `initializer_range`), token ids, which
follow from the tokenizer, and `vision.rope_theta`, for which the published form has no place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import ConfigError
from qwen2vl_train.model.config import ModelConfig

_COMPARED = ("tie_word_embeddings", "positions")
_TEXT_FREE = ("max_position_embeddings",)
_VISION_FREE = ("rope_theta",)


def refuse_other_model(
    folder: Path, stage: str, config: ModelConfig, tokenizer: TextTokenizer, warn: Callable[[str], None]
) -> None:
    """Refuse to begin `stage` with the weights in `folder` as another model than they are.

    Raises:
        ConfigError: naming each setting with both values, or the first ids that mean different tokens.
    """
    key = f"stages.{stage}.init_from"
    try:
        held = ModelConfig.from_hf(folder)
    except ValueError as error:  # not JSON, or settings that this model does not compute
        raise ConfigError(f"{key}: {folder / 'config.json'}: {error}; choose another folder") from error
    if fault := _difference(asdict(held), asdict(config), "the folder"):
        raise ConfigError(
            f"{key}: the weights in {folder} are of another model {fault}; to go on with other values on purpose, "
            "write them into a copy of the folder's config.json"
        )
    _compare_tokenizers(folder, key, tokenizer, warn)


def refuse_other_tensors(checkpoint: Path, config: ModelConfig) -> None:
    """Refuse a checkpoint of another model, which DeepSpeed would meet as sizes that do not fit.

    Raises:
        ConfigError: naming each setting with both values. Checkpoints that do not tell their model pass.
    """
    held = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("model")
    ours = json.loads(json.dumps(asdict(config)))  # tuples as JSON reads them back
    if held is not None and (fault := _difference(held, ours, "it")):
        raise ConfigError(f"{checkpoint} is of another model {fault} (a vocabulary of 0 follows data.tokenizer)")


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], owner: str) -> str:
    """What of `theirs`, a model's settings, differs from `ours`, and how to set it; empty where nothing does."""
    held, now = _computed(theirs), _computed(ours)
    changed = [name for name in now if held[name] != now[name]]
    listed = "; ".join(f"{name}: {owner} has {held[name]}, this run {now[name]}" for name in changed)
    return f"({listed}). Set {' '.join(f'{name}={_as_override(held[name])}' for name in changed)}" if changed else ""


def _compare_tokenizers(folder: Path, key: str, tokenizer: TextTokenizer, warn: Callable[[str], None]) -> None:
    """Another file is a warning where every id that both know is the same token, else an error."""
    mine, theirs = Path(tokenizer.path) / "tokenizer.json", folder / "tokenizer.json"
    if not theirs.is_file():
        warn(f"{key}: {folder} has no tokenizer.json, so nothing tells whether its ids are those of {mine}")
        return
    if theirs.read_bytes() == mine.read_bytes():
        return
    held, now = (_tokens(path) for path in (theirs, mine))
    clashes = [number for number in sorted(held.keys() & now.keys()) if held[number] != now[number]]
    if clashes:
        shown = ", ".join(f"{number} is {held[number]!r} there and {now[number]!r} here" for number in clashes[:3])
        raise ConfigError(
            f"{key}: the model in {folder} was trained with another tokenizer than data.tokenizer="
            f"{tokenizer.path}: {len(clashes)} ids mean other tokens ({shown}). Set data.tokenizer={folder}, or start "
            "from a model of this tokenizer"
        )
    warn(
        f"{key}: {theirs} is another file than {mine}, but the {len(held.keys() & now.keys())} ids that both have are "
        f"the same tokens ({len(held)} there, {len(now)} here); text may be split otherwise"
    )


def _computed(model: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the model's outputs, under the names that the command line has for it."""
    parts: dict[str, Mapping[str, Any]] = {
        "vision.": {name: value for name, value in model["vision"].items() if name not in _VISION_FREE},
        "text.": {name: value for name, value in model["text"].items() if name not in _TEXT_FREE},
        "": {name: model[name] for name in _COMPARED},
    }
    return {f"model.config.{part}{name}": value for part, values in parts.items() for name, value in values.items()}


def _as_override(value: Any) -> str:
    """As Hydra reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)


def _tokens(path: Path) -> dict[int, str]:
    """Token by id."""
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception for malformed files
        raise ConfigError(f"{path}: not a tokenizer file ({error})") from error
    return {number: token for token, number in vocabulary.items()}
