"""What decides the packs of a run: mixture, template, budgets, tokenizer, seed, packs per step and ranks.

Enters: options of a command (shards named there), a YAML or JSON file of these settings, or the folder of a training
run: each stage's `settings.json`, or `config.json` for a stage that has not begun. Leaves: a `DataRun`. The trainer is
not imported: a run's stored settings are plain values, validated against the same dataclasses.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from data_pipelines.config import DataConfig, MediaConfig, PlanConfig, SourceConfig
from data_pipelines.errors import UserError
from data_pipelines.plan.balance import COST_NAME, PackCost
from data_pipelines.shards.names import file_of, public_name
from data_pipelines.shards.storage import expand_shards


@with_config(ConfigDict(extra="forbid"))  # the nested dataclasses inherit it
@dataclass(frozen=True)
class DataRun:
    """Settings that decide every pack. `tokenizer` is a folder; `packs_per_step` counts all ranks' packs of a step.

    `cost` is the model's, where the trainer deals packs by it: four coefficients that only the trainer works out.
    """

    tokenizer: str
    data: DataConfig
    seed: int = 0
    packs_per_step: int = 1
    world: int = 1
    cost: PackCost | None = None

    def __post_init__(self) -> None:
        if self.world < 1 or self.packs_per_step < 1 or self.packs_per_step % self.world:
            raise UserError(
                f"packs_per_step={self.packs_per_step} is not a multiple of world={self.world}: every rank takes the "
                "same number of packs; give the numbers the run had"
            )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that look at a mixture: shards on the command line, or settings in a file."""
    media = MediaConfig()
    parser.add_argument(
        "shards", nargs="*", metavar="[NAME=]TAR", help="paths, globs or ranges, with a name or without"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings instead of shards: YAML, or a run's folder"
    )
    parser.add_argument("--stage", help="which stage of a run's folder")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: a folder `tokenizer` near the shards")
    parser.add_argument("--template", choices=("plain", "chatml"), default="plain", help="template (%(default)s)")
    for name, value, text in (
        ("max-tokens", PlanConfig.max_tokens, "tokens of a pack"),
        ("max-patches", 0, "its ViT patches; 0: four a token"),
        ("max-pixels", media.max_pixels, "of a still image"),
        ("min-pixels", media.min_pixels, "of a still image"),
        ("video-max-pixels", media.video_max_pixels, "of a frame"),
        ("max-frames", media.max_frames, "of a clip"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--fps", type=float, default=media.fps, help="frames a second taken of a clip (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the plan (%(default)s)")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")


def data_run_of(options: argparse.Namespace) -> DataRun:
    """The settings that the options name. Shards given without a file are each read once: shares by size.

    `tokenizer` is "" where none is given and none lies near the shards.

    Raises:
        UserError: neither or both of shards and --config, or settings that cannot be.
    """
    if bool(options.shards) == bool(options.config):
        raise UserError("give shards to look at, or --config FILE with their settings (one of the two)")
    if options.config:
        run = read_data_run(options.config, options.stage)
        return replace(run, tokenizer=str(options.tokenizer)) if options.tokenizer else run
    sources = {
        name: SourceConfig(tuple(shards), epochs=1.0, max_error_rate=1.0)
        for name, shards in name_sources(options.shards).items()
    }
    small = min(options.min_pixels, options.max_pixels)
    frame = options.video_max_pixels
    media = MediaConfig(
        min_pixels=small, max_pixels=options.max_pixels, fps=options.fps, max_frames=options.max_frames,
        video_min_pixels=min(MediaConfig.video_min_pixels, frame), video_max_pixels=frame,
    )  # fmt: skip
    plan = PlanConfig(options.max_tokens, options.max_patches or 4 * options.max_tokens)
    tokenizer = options.tokenizer or _tokenizer_near(next(iter(sources.values())).shards[0])
    data = DataConfig(sources, options.template, media, plan)
    return DataRun(str(tokenizer or ""), data, options.seed)


def read_data_run(path: Path, stage: str | None = None, **changes: int | None) -> DataRun:
    """The settings in `path`: a YAML or JSON file of `DataRun`'s fields, or a run's folder (or its config.json).

    `changes` (seed, packs_per_step, world) replace what the file says; None keeps it.

    Raises:
        UserError: no such file, no such stage, or values that cannot be; the message says which.
    """
    path, settings = read_settings(path)
    if "stages" in settings:
        try:
            name = choose_stage(settings, stage, path)
            settings = _of_stage(settings_of_stage(settings, name, path), name, path)
        except KeyError as error:
            raise UserError(f"{path}: {error} is missing; give a run's folder as training left it") from error
    try:
        changed = {name: value for name, value in changes.items() if value is not None}
        return TypeAdapter(DataRun).validate_python({**settings, **changed})
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_faults(error))}") from error


def read_settings(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file of settings that `path` (a run's folder or a file) means, and what it holds, not yet checked.

    Raises:
        UserError: no such file, or not a mapping in YAML or JSON.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a YAML file or the folder of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else f": {error}"
        raise UserError(f"{path} is not YAML{place}") from error
    if not isinstance(settings, Mapping):
        raise UserError(f"{path}: give settings (tokenizer, data, seed, packs_per_step, world), not {settings!r:.80}")
    return path, settings


def choose_stage(settings: Mapping[str, Any], stage: str | None, path: Path) -> str:
    """The stage that is meant: the one named, or the only one that the run of these settings trains.

    Raises:
        UserError: none is named and there are several, or no such stage.
    """
    stages = settings["stages"]
    trained = settings.get("chain") or list(stages)
    name = trained[0] if stage is None and len(trained) == 1 else stage
    if name not in stages:
        given = f"--stage {name} is none of them" if name else "say which with --stage"
        raise UserError(f"{path} holds the stages {', '.join(stages)}: {given}")
    return str(name)


def settings_of_stage(settings: Mapping[str, Any], stage: str, path: Path) -> Mapping[str, Any]:
    """The run's `settings` (read from `path`) as `stage` was last started with them.

    The run's file is of its last start, which may have been another stage's, with another seed, data or tokenizer.

    Raises:
        UserError: the file that the stage keeps is damaged.
    """
    file = path.parent / stage / "settings.json"
    if not file.is_file():
        return settings
    try:
        kept = _as_tree(json.loads(file.read_text(encoding="utf-8")))
        mine = kept["stages"][stage]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({error}): restore it from a copy, or give the settings: qwen2vl show OVERRIDES"
        ) from error
    planned = settings["stages"][stage].get("data", {})
    absent = {how: planned[how] for how in ("loader", "remote") if how in planned}  # in those of older runs
    return {
        **settings,
        **{key: kept[key] for key in ("seed", "world") if key in kept},
        "data": {**settings.get("data", {}), **kept.get("data", {})},
        "stages": {**settings["stages"], stage: {**mine, "data": {**absent, **mine["data"]}}},
    }


def name_sources(words: Sequence[str]) -> dict[str, list[str]]:
    """Shards by data set. NAME=PATTERN says the name; else it is the file's without its number ("coco-00012.tar").

    Files of one name in several folders get the folder's before it: "train/coco", "heldout/coco".

    Raises:
        ShardError: a pattern that names no file.
    """
    named: dict[str, list[str]] = {}
    found: dict[str, dict[str, list[str]]] = {}
    for word in words:
        name, given, pattern = word.partition("=")
        if given and re.fullmatch(r"[\w.-]+", name):
            named.setdefault(name, []).extend(expand_shards(name, [pattern]))
            continue
        for shard in expand_shards("", [word]):
            path = Path(file_of(public_name(shard)))
            folder = path.parent
            stem = re.sub(r"[-_.]?\d+$", "", path.name.removesuffix(".tar").removesuffix(".jsonl")) or folder.name
            found.setdefault(stem, {}).setdefault(str(folder), []).append(shard)
    for stem, folders in found.items():
        for place, shards in folders.items():
            name = stem if len(folders) == 1 else f"{Path(place).name}/{stem}"
            named.setdefault(name, []).extend(shards)
    return {name: list(dict.fromkeys(shards)) for name, shards in named.items()}


def _faults(error: ValidationError) -> Iterator[str]:
    """Each fault of settings: the key, its value where that is short, and what is wrong."""
    for fault in error.errors(include_url=False):
        value = "" if isinstance(fault["input"], Mapping) else f" = {fault['input']!r:.60}"
        unknown = fault["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        message = "unknown key" if unknown else fault["msg"].removeprefix("Value error, ")
        key = ".".join(map(str, fault["loc"]))
        yield f"{key}{value}: {message}" if key else message


def _of_stage(settings: Mapping[str, Any], stage: str, path: Path) -> dict[str, Any]:
    """A training configuration's values for one stage; ranks from `environment.json` where the stage kept none."""
    stages = settings["stages"]
    chosen: dict[str, Any] = {
        "tokenizer": settings["data"]["tokenizer"],
        "data": stages[stage]["data"],
        "seed": settings["seed"],
        "packs_per_step": stages[stage]["packs_per_step"],
    }
    with suppress(OSError):  # a stage that has not begun has no cost yet, and no packs to show
        chosen["cost"] = json.loads((path.parent / stage / COST_NAME).read_text(encoding="utf-8"))
    if "world" in settings:
        return {**chosen, "world": settings["world"]}
    try:
        environment = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))
        shared = int(settings.get("engine", {}).get("sequence_parallel", 1))  # ranks that hold one pack together
        return {**chosen, "world": int(environment["world_size"]) // shared}
    except (OSError, ValueError, KeyError):
        return chosen


def _as_tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Settings {"a.b": value} nested again. A source's name may hold dots, its fields' names do not.

    >>> _as_tree({"seed": 3, "stages.vision.data.sources.coco.v2.weight": 2.0})
    {'seed': 3, 'stages': {'vision': {'data': {'sources': {'coco.v2': {'weight': 2.0}}}}}}
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        if parents[2:4] == ["data", "sources"]:
            parents[4:] = [".".join(parents[4:])]
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree


def _tokenizer_near(shard: str) -> Path | None:
    """A folder `tokenizer` beside the shard, or up to two folders above it."""
    folders = list(Path(shard).resolve().parents)[:3]
    return next((folder / "tokenizer" for folder in folders if (folder / "tokenizer/tokenizer.json").is_file()), None)
