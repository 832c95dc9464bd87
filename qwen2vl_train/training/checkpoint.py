"""Checkpoints that are whole or absent.

A checkpoint is a directory `step-00000100` with DeepSpeed's shards, `state.json` (step, loader state, totals) and
`manifest.json` (size and checksum of every file). It is written aside, flushed to disk, renamed, and only then does the
file `latest` name it. DeepSpeed's own `latest` is not used: rank 0 writes it before the other ranks have finished.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from qwen2vl_train.training.engine import Engine
from qwen2vl_train.training.world import World


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another world size. The message says what to do."""


class CheckpointStore:
    """The checkpoints of one stage in one folder; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self._folder = folder
        self._keep = max(1, keep)
        self._world = world

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint after `step` updates. Collective; `state` (JSON) must be the same on every rank."""
        final = self._folder / f"step-{step:08d}"
        aside = self._folder / f".writing-{final.name}"
        self._world.from_main(lambda: _make_empty(aside))
        engine.save(aside)
        self._world.barrier()  # every rank's shard is written
        self._world.from_main(lambda: self._publish(aside, final, {"step": step, "world": self._world.size, **state}))
        return final

    def _publish(self, aside: Path, final: Path, state: dict[str, Any]) -> None:
        write_json(aside / "state.json", state)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(aside)): [path.stat().st_size, _checksum(path)] for path in files}
        write_json(aside / "manifest.json", manifest)
        for path in files:
            _flush(path)
        for folder in {path.parent for path in files}:
            _flush(folder)
        if final.exists():  # a step done again after a resume from an earlier one
            shutil.rmtree(final)
        aside.rename(final)
        _flush(self._folder)
        _write_text(self._folder / "latest", final.name)
        for old in sorted(self._folder.glob("step-*"))[: -self._keep]:
            shutil.rmtree(old)

    def find(self, resume: str) -> Path | None:
        """The checkpoint to continue from: "auto" the newest whole one or None, "none" None, else that path, verified.

        Collective: rank 0 looks, so that all ranks agree.
        """
        return self._world.from_main(lambda: self._find(resume))

    def _find(self, resume: str) -> Path | None:
        for leftover in self._folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        if resume == "none":
            return None
        if resume != "auto":
            fault = fault_of(Path(resume))
            if fault:
                raise CheckpointError(f"resume={resume}: {fault}")
            return Path(resume)
        newest_first = sorted(self._folder.glob("step-*"), reverse=True)
        return next((path for path in newest_first if fault_of(path) is None), None)

    def load(self, engine: Engine, path: Path) -> dict[str, Any]:
        """Restore `engine` from `path` and return the state saved with it. Collective.

        Raises:
            CheckpointError: the checkpoint belongs to another world size.
        """
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state["world"] != self._world.size:
            raise CheckpointError(
                f"{path} was written by {state['world']} ranks, this run has {self._world.size}: start as many ranks, "
                "or start the stage from its predecessor's export with resume=none"
            )
        engine.load(path)
        return state


def fault_of(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`: a missing, short or altered file. None when it is whole."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return f"{manifest} is missing: not a finished checkpoint"
    for name, (size, checksum) in json.loads(manifest.read_text()).items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{file} is missing or not {size} bytes"
        if _checksum(file) != checksum:
            return f"{file} has another checksum than when it was written"
    return None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that the file is old or new, never half."""
    _write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    _flush(aside)
    aside.replace(path)
    _flush(path.parent)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _flush(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
