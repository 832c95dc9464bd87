"""YAML files and command-line words → one plain tree of settings. The only file that knows Hydra.

Enters: `experiment=demo stages.vision.steps=100`. Leaves: every value resolved, and the same tree as it is written,
with its references (`${shared.media}`). Words that choose files (`model=2b`) go to Hydra; words that set values are
applied here: Hydra would let `stages.vision.data.media.max_pixels=…` replace the whole reference `${shared.media}` by
this one key, and every other limit would silently fall back to its default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from qwen2vl_train.config import ConfigError

NOT_GIVEN = "(not given)"


@dataclass(frozen=True)
class Composed:
    """`resolved`: plain values. `written`: the same with references. `missing`: keys that must be given and were not.

    Missing ones are `NOT_GIVEN` in `resolved`.
    """

    resolved: dict[str, Any]
    written: dict[str, Any]
    missing: tuple[str, ...] = ()


def compose_settings(overrides: Sequence[str], folder: Path, allow_missing: bool = False) -> Composed:
    """Compose `train.yaml` of `folder` with the overrides.

    Raises:
        ConfigError: unknown file, malformed word, broken reference, or (unless allowed) a value that must be given.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        words = [_chain(word) for word in overrides]
        choices = [word for word in words if _chooses_file(word, folder)]
        values = OverridesParser.create().parse_overrides([word for word in words if word not in choices])
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose("train", overrides=choices)
        # what lies behind a reference last: its copy then has all that was set where the reference leads
        for value in sorted(values, key=lambda value: _crosses_reference(config, value)):
            _apply(config, value)
        written = _plain(OmegaConf.to_container(config, resolve=False))
        missing = tuple(_open_places(written)) if allow_missing else ()
        for key in missing:
            OmegaConf.update(config, key, NOT_GIVEN)
        resolved = _plain(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    return Composed(resolved, written, missing)


def as_yaml(run: Mapping[str, Any], composed: Composed) -> str:
    """Every value of `run` (a validated configuration as plain dicts) as YAML, with where it comes from as a comment.

    `# ${shared.media}` refers to another key; `# default` is in no file. What only references use comes last.
    """
    used = {key: value for key, value in composed.resolved.items() if key not in run}
    return "".join(_lines({**run, **used}, composed.resolved, composed.written, ""))


def _lines(values: Mapping[Any, Any], given: Any, written: Any, indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        known = isinstance(given, Mapping) and key in given
        source = written.get(key) if isinstance(written, Mapping) else None
        origin = str(source) if isinstance(source, str | list) and "${" in str(source) else ""
        if isinstance(value, Mapping) and value and known:
            lines.append(f"{indent}{_inline(key)}:{origin and f'  # {origin}'}\n")
            lines += _lines(value, given[key], source, indent + "  ")
        else:
            origin = origin if known else "default"
            lines.append(f"{indent}{_inline(key)}: {_inline(value)}{origin and f'  # {origin}'}\n")
    return lines


def _inline(value: Any) -> str:
    """One line of YAML: 3, vit, [vit, merger]."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(tree: Any) -> dict[str, Any]:
    return {str(key): value for key, value in tree.items()}


def _open_places(written: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Keys whose value is ???: it must be given."""
    found = []
    for key, value in written.items():
        if value == "???":
            found.append(f"{prefix}{key}")
        elif isinstance(value, Mapping):
            found += _open_places(value, f"{prefix}{key}.")
    return found


def _chain(word: str) -> str:
    """`stage=vision,instruct` is short for `chain=[vision,instruct]`."""
    return f"chain=[{word.removeprefix('stage=')}]" if word.startswith("stage=") else word


def _chooses_file(word: str, folder: Path) -> bool:
    key = word.lstrip("+~").partition("=")[0].partition("@")[0]
    return (folder / key).is_dir()


def _apply(config: Any, override: Any) -> None:
    """Set, add or take out one value. What a reference on its way names is copied first, so that nothing else changes.

    A key that does not exist yet is added: validation names it, with the nearest known one.
    """
    from omegaconf import OmegaConf, open_dict

    key = override.key_or_group
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: several values; write a list, {key}=[…]")
    if override.is_delete():
        *path, name = key.split(".")
        parent = _own(config, path)
        if name not in (parent or ()):
            known = f"; known there: {', '.join(map(str, parent))}" if parent else ""
            raise ConfigError(f"{override.input_line}: there is no {key} to take out{known}")
        with open_dict(parent):
            del parent[name]
        return
    _own(config, _way_to(override))
    with open_dict(config):
        OmegaConf.update(config, key, override.value(), merge=True, force_add=True)


def _way_to(override: Any) -> list[str]:
    """The sections that the override changes inside; one that is given as a whole is merged with what is there."""
    return list(override.key_or_group.split(".")[: None if isinstance(override.value(), Mapping) else -1])


def _crosses_reference(config: Any, override: Any) -> bool:
    from omegaconf import DictConfig, OmegaConf

    node = config
    for part in _way_to(override):
        if not isinstance(node, DictConfig) or part not in node:
            return False
        if OmegaConf.is_interpolation(node, part):
            return True
        node = node[part]
    return False


def _own(config: Any, path: Sequence[str]) -> Any:
    """Follow `path` as far as it exists, replacing references by copies of what they name; the last node, or None."""
    from omegaconf import DictConfig, OmegaConf

    node = config
    for part in path:
        if not isinstance(node, DictConfig) or part not in node:
            return None
        if OmegaConf.is_interpolation(node, part) and isinstance(node[part], DictConfig):
            node[part] = OmegaConf.to_container(node[part], resolve=False)
        node = node[part]
    return node


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message without its search path, and its cause where that hides behind a second exception."""
    causes = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for cause in causes for line in cause.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("provider=", "Config search path"))]
    return f"{'; '.join(kept)}\nOverrides given: {' '.join(overrides) or '(none)'}"
