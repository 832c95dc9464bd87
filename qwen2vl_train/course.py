"""Which course a stage takes: anew, on from a checkpoint, or done before; from which weights, under which settings.

Enters: the configuration and what earlier starts left in the stage's folder. Leaves: `settings.json`, which holds the
stage's settings and the weights it starts from, and a `ConfigError` where those would be another's that decide its
outcome.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from qwen2vl_train.config import ConfigError, RunConfig
from qwen2vl_train.export import fingerprint
from qwen2vl_train.training.kept import read_json, write_json
from qwen2vl_train.training.restart import job

_DECIDE_TENSORS = ("trainable", "optim.name", "optim.vit_layer_decay")  # the optimizer's groups and state
_RESTORE = "restore it from a copy, or remove it if this command's settings are those that the stage was begun with"
_WEIGHTS = "initial_weights"  # beside the settings: which weights the stage was begun with
_TOKENIZER, _WORLD = "data.tokenizer", "world"  # beside them, for what shows the stage's packs again
# Of a stage, what changes nothing that is trained: its score, workers and caches, and when what fails is given up.
_FREE = re.compile(
    r"evaluate|data\.(loader|remote)\..+|data\.media\.decode_timeout_s|data\.sources\..+\.max_error_rate"
)


def resume_of(run: RunConfig, name: str, restarted: bool = False) -> str:
    """How stage `name` continues: "auto", "none", or a checkpoint's path.

    `resume=PATH` belongs to the stage that wrote it: stages before it go on as they are, later ones start anew. A job
    that its launcher has `restarted` goes on from what it has done itself, instead of doing that again each time.

    Raises:
        ConfigError: the path holds no checkpoint, or one of a stage that is not in the chain.
    """
    resume = run.resume
    if resume not in ("auto", "none"):
        owner = _owner(run, restarted)
        if owner not in run.chain:
            raise ConfigError(f"resume={resume}: a checkpoint of stage {owner}, which chain={list(run.chain)} lacks")
        if name != owner:
            resume = "auto" if run.chain.index(name) < run.chain.index(owner) else "none"
    return "auto" if restarted and _begun_by_this_job(Path(run.run_dir) / name) else resume


def _owner(run: RunConfig, restarted: bool) -> str:
    """The stage that wrote the checkpoint `run.resume`; a restart may find it replaced by later ones of its folder."""
    path = Path(run.resume)
    if (path / "state.json").is_file():
        owner: str = read_json(path / "state.json", "name another checkpoint")["stage"]
        return owner
    stage = path.resolve().parent.parent
    if restarted and stage.parent == Path(run.run_dir).resolve() and _begun_by_this_job(stage):
        return stage.name
    raise ConfigError(
        f"resume={run.resume}: {path / 'state.json'} is missing; name a folder step-NNNNNNNN, auto or none"
    )


def _begun_by_this_job(folder: Path) -> bool:
    """Whether this job wrote the stage's result or one of its checkpoints."""
    for path in (folder / "result.json", *(folder / "checkpoints").glob("step-????????/state.json")):
        try:
            if path.is_file() and json.loads(path.read_text()).get("job") == job():
                return True
        except ValueError:  # damaged: the others tell
            continue
    return False


def initial_weights(run: RunConfig, name: str) -> Path | None:
    """The folder whose weights stage `name` starts from; None for random ones.

    Raises:
        ConfigError: the previous stage has no export yet, or the named folder holds no config.json.
    """
    wanted = run.stages[name].init_from
    order = list(run.stages)
    if wanted == "scratch":
        return None
    if wanted == "previous" and order.index(name) == 0:
        raise ConfigError(
            f"stages.{name}.init_from=previous: {name} is the first stage; name a Hugging Face folder to start from "
            "(qwen2vl assemble makes one from Qwen2 and a CLIP tower), or scratch"
        )
    path = Path(run.run_dir) / order[order.index(name) - 1] / "export" if wanted == "previous" else Path(wanted)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"stages.{name}.init_from={wanted}: {path} holds no model; run that stage first, or set init_from to "
            "'scratch' or to a Hugging Face folder"
        )
    return path


def refuse_other_settings(run: RunConfig, name: str, resume: str = "auto") -> None:
    """Neither continue nor reuse stage `name` under other settings than it was begun with.

    A start that left neither checkpoint nor result binds nobody: its settings may have been the mistake. A checkpoint
    that `resume` names may be taken under others, but for those that decide which tensors it holds.

    Raises:
        ConfigError: naming each key that differs, with both values.
    """
    folder = Path(run.run_dir) / name
    held = _kept(settings_file(run, name)) if resume == "auto" else _settings_of_checkpoint(Path(resume))
    if held is None or (resume == "auto" and not _has_begun(folder)):
        return
    mine, held = _deciding(_settings(run, name), name), _deciding(held, name)
    # a key that did not exist then had its default's effect
    held = {key: value for key, value in _defaults_of(run, name).items() if key in mine} | held
    changed = [key for key in sorted(mine.keys() | held.keys()) if mine.get(key) != held.get(key)]
    sources = f"stages.{name}.data.sources."
    if resume != "auto":
        tensors = ("model.config.", *(f"stages.{name}.{key}" for key in _DECIDE_TENSORS))
        changed = [key for key in changed if key.startswith(tensors)]
    if run.data_change == "accept":
        changed = [key for key in changed if not key.startswith(sources)]
    if changed:
        accept = ", set data_change=accept" if all(key.startswith(sources) for key in changed) else ""
        listed = "; ".join(f"{key}: was {held.get(key)}, is {mine.get(key)}" for key in changed[:10])
        if resume != "auto":
            raise ConfigError(
                f"resume={resume} was written with other settings ({listed}). Restore them, or name another checkpoint"
            )
        raise ConfigError(
            f"{folder} was begun with other settings ({listed}). Restore them{accept}, choose another "
            f"run_dir, or start the stage anew with stage={name} resume=none"
        )


def refuse_other_weights(run: RunConfig, name: str) -> None:
    """Neither continue nor reuse stage `name` when the weights it was begun with are not those it would start from now.

    Raises:
        ConfigError: naming the stages to start anew.
    """
    if is_stale(run, name):
        order = list(run.stages)
        later = [stage for stage in order[order.index(name) :] if _has_begun(Path(run.run_dir) / stage)]
        raise ConfigError(
            f"{Path(run.run_dir) / name} was begun with other weights than {initial_weights(run, name)} holds now: "
            f"they have been trained anew since. Start what follows anew, too, with stage={','.join(later)} "
            "resume=none, or choose another run_dir"
        )


def is_stale(run: RunConfig, name: str) -> bool:
    """Whether stage `name` was begun with other weights than lie now where it would take them."""
    path = settings_file(run, name)
    if not path.is_file() or not _has_begun(path.parent):
        return False
    held, now = read_json(path, _RESTORE).get(_WEIGHTS), _weights_now(run, name)
    return held is not None and now is not None and held != now


def keep_settings(run: RunConfig, name: str, resume: str = "auto", world: int = 1) -> None:
    """Keep the settings of stage `name` in its folder; one that goes on keeps the weights it was begun with.

    `world`: on how many ranks with packs of their own it begins or goes on.
    """
    path = settings_file(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (path.parent / "result.json").is_file():  # a finished stage was trained with what it has
        return
    goes_on = resume != "none" and path.is_file() and _has_begun(path.parent)
    weights = read_json(path, _RESTORE).get(_WEIGHTS) if goes_on else _weights_now(run, name)
    write_json(path, _settings(run, name) | {_WEIGHTS: weights, _TOKENIZER: run.data.tokenizer, _WORLD: world})


def settings_of(run: RunConfig, name: str) -> dict[str, Any]:
    """What `keep_settings` has kept of stage `name`."""
    return _kept(settings_file(run, name)) or {}


def settings_file(run: RunConfig, name: str) -> Path:
    """Where the settings that stage `name` was begun with are kept."""
    return Path(run.run_dir) / name / "settings.json"


# ---------------------------------------------------------------------------------------------------------------------


def _kept(path: Path) -> dict[str, Any] | None:
    return read_json(path, _RESTORE) if path.is_file() else None


def _settings_of_checkpoint(path: Path) -> dict[str, Any] | None:
    """Those that a checkpoint was written with: its own, or its stage's; None where neither is known."""
    held: dict[str, Any] | None = (_kept(path / "state.json") or {}).get("settings")
    return held or _kept(path.resolve().parent.parent / "settings.json")


def _has_begun(folder: Path) -> bool:
    """Whether the stage left something that a later start would go on from, or reuse."""
    checkpoints = folder / "checkpoints"
    kept = any(path for form in ("step-*", ".replaced-step-*") for path in checkpoints.glob(form))
    return kept or (folder / "result.json").is_file()


def _weights_now(run: RunConfig, name: str) -> str | None:
    """Which weights lie where stage `name` takes its own; None for random ones, or where none lie (any more)."""
    try:
        path = initial_weights(run, name)
    except ConfigError:
        return None
    return None if path is None else fingerprint(path)


def _settings(run: RunConfig, name: str) -> dict[str, Any]:
    """The settings of stage `name`, flat, as JSON reads them back."""
    model, stage = asdict(run.model.config), asdict(run.stages[name])
    flat = _flat({"seed": run.seed, "model.config": model, f"stages.{name}": stage})
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


def _deciding(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of `settings` that change what stage `name` makes."""
    beside = (_WEIGHTS, _TOKENIZER, _WORLD)
    short = {key: key.removeprefix(f"stages.{name}.") for key in settings if key not in beside}
    return {key: settings[key] for key, part in short.items() if not _FREE.fullmatch(part)}


def _defaults_of(run: RunConfig, name: str) -> dict[str, Any]:
    """What the same keys are when nobody sets them, as far as they have a default."""
    flat = _flat({"model.config": _defaults(run.model.config), f"stages.{name}": _defaults(run.stages[name])})
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


def _defaults(value: Any) -> dict[str, Any]:
    """The defaults of a configuration's fields, nested as its values are; fields without one are left out."""
    if isinstance(value, Mapping):
        return {key: _defaults(item) for key, item in value.items() if is_dataclass(item)}
    found: dict[str, Any] = {}
    for field in fields(value):
        mine = getattr(value, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is not MISSING and not isinstance(mine, Mapping):
            found[field.name] = asdict(default) if is_dataclass(default) else default  # type: ignore[arg-type]
        elif is_dataclass(mine) or isinstance(mine, Mapping):
            found[field.name] = _defaults(mine)
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat
