"""Command-line overrides → YAML → Hydra → frozen dataclasses: the one border that configuration crosses.

Enters: a list of Hydra overrides (`experiment=demo stages.vision.steps=100`). Leaves: a validated `RunConfig`, or a
`ConfigError` that names the key, its value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qwen2vl_train.compose import compose_settings
from qwen2vl_train.config import ConfigError, RunConfig


def config_dir() -> Path:
    """The folder of YAML files: packaged with a wheel, or beside the packages in a checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "configs", here.parent / "configs") if (path / "train.yaml").is_file())


def load_config(
    overrides: Sequence[str], folder: Path | None = None, allow_missing: bool = False
) -> tuple[RunConfig, dict[str, Any]]:
    """Compose `train.yaml` with the overrides and validate it.

    `stage=NAME[,NAME]` is short for `chain=[NAME,…]`: it runs only these stages of the experiment.
    Returns the validated configuration and the resolved plain dict (to be stored with the run). With `allow_missing`,
    places that must be given and were not are `compose.NOT_GIVEN`.

    Raises:
        ConfigError: unknown key or group, wrong type, contradiction; the message says which and what to do.
    """
    composed = compose_settings(overrides, (folder or config_dir()).resolve(), allow_missing)
    plain = dict(composed.resolved)
    _check_names("shared", plain.pop("shared", {}), ("plan", "media", "loader"))
    _check_names("mixture", plain.pop("mixture", {}), plain.get("stages", {}))
    _check_stages(plain.get("stages", {}))
    try:
        return TypeAdapter(RunConfig).validate_python(plain), plain
    except ValidationError as error:
        raise ConfigError(_explain_validation(error)) from error


def _check_names(section: str, values: dict[str, Any], known: Collection[str]) -> None:
    """`shared` and `mixture` are only referred to by other values, so a misspelt name in them would do nothing.

    A data file may hold mixtures for stages that an experiment does not run.
    """
    allowed = {*known, "language", "vision", "multitask", "instruct"} if section == "mixture" else set(known)
    for name in values.keys() - allowed:
        near = difflib.get_close_matches(name, sorted(allowed), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(allowed))}"
        raise ConfigError(f"{section}.{name} = {_shorten(values[name])}: unknown key; {hint}")


def _check_stages(stages: dict[str, Any]) -> None:
    """A misspelt stage in an override makes a new, nearly empty one: say so instead of listing what it lacks."""
    partial = [name for name, values in stages.items() if isinstance(values, dict) and "trainable" not in values]
    known = [name for name in stages if name not in partial]
    for name in partial if known else ():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"stages.{name} = {_shorten(stages[name])}: unknown stage; {hint}This experiment's are {', '.join(known)}; "
            f"`/stage@stages.{name}: vision` in an experiment file's defaults adds one"
        )


def _explain_validation(error: ValidationError) -> str:
    """One line per fault: key, value, what is wrong, and for an unknown key the nearest known one."""
    lines = []
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        shown = "" if isinstance(fault["input"], dict) else f" = {_shorten(fault['input'])}"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = sorted(_known_keys(path[:-1]))
            near = difflib.get_close_matches(path[-1], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            message = f"unknown key; {hint}"
        lines.append(f"{'.'.join(path) or 'configuration'}{shown}: {message}")
    return "\n".join(lines)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(path: Sequence[str]) -> list[str]:
    """Field names of the dataclass that `path` leads to; empty where it leads into free-form keys."""
    node: Any = TypeAdapter(RunConfig).json_schema()
    definitions = node.get("$defs", {})
    for part in path:
        node = _deref(node, definitions)
        node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
    return list(_deref(node, definitions).get("properties", {}))


def _deref(node: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            return definitions[option["$ref"].rsplit("/", 1)[-1]]  # type: ignore[no-any-return]
    return node  # type: ignore[no-any-return]
