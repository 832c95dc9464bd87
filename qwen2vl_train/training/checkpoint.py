"""Checkpoints that are whole or absent.

A checkpoint is a directory `step-00000100` with DeepSpeed's shards, `state.json` (step, loader state, totals) and
`manifest.json` (size and checksum of every file). It is written aside, flushed to disk, renamed, and only then does the
file `latest` name it: for people and scripts, since `resume=auto` takes the newest whole folder, which is the same one.
DeepSpeed's own `latest` is not used: rank 0 writes it before the other ranks have finished.
Each rank flushes and sums up the files that it wrote, and when loading checks a share of all, so no rank reads it all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.whole import flush_to_disk, write_whole
from qwen2vl_train.config import CheckpointConfig
from qwen2vl_train.training.conversion import ConversionError, convert
from qwen2vl_train.training.engine import Engine
from qwen2vl_train.training.failure import is_consequence
from qwen2vl_train.training.kept import write_json
from qwen2vl_train.training.manifest import checksum, fault_of
from qwen2vl_train.training.restart import job
from qwen2vl_train.training.world import World

_RANK_OF_FILE = re.compile(r"zero_pp_rank_(\d+)_")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the run. The message says what to do."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint being written: where, what it will be called, its `state.json`, and this rank's part to come."""

    aside: Path
    final: Path
    state: dict[str, Any]
    written: Future[dict[str, tuple[int, int]]]


class CheckpointStore:
    """The checkpoints of one stage in one folder, `STAGE/checkpoints`."""

    def __init__(self, folder: Path, config: CheckpointConfig, world: World, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._config = config
        self._world = world
        self._warn = warn
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def save(self, engine: Engine, step: int, state: dict[str, Any], wait: bool = True) -> Path | None:
        """Write a checkpoint after `step` updates; None where the disk has no room. Collective.

        `state` (JSON) must be the same on every rank. Afterwards the newest `keep` are there, and those to be kept for
        good; later steps than this one, of a run that was started anew from an earlier step, are gone.
        With `wait` false and `checkpoint.asynchronous`, it is written while training goes on: see `poll`.

        Raises:
            CheckpointError: a rank could not write its files; `latest` still names the checkpoint before.
        """
        self.finish()
        final = self._folder / f"step-{step:08d}"
        aside = self._folder / f".writing-{final.name}"
        lacking = self._world.from_main(lambda: self._prepare(aside, engine.checkpoint_bytes()))
        if lacking:
            self._warn(f"no checkpoint at step {step}: {lacking}")
            return None
        whole = {"step": step, "world": self._world.size, "engine": engine.signature, "job": job(), **state}
        try:
            if self._config.asynchronous and not wait:
                writes = engine.snapshot(aside)
                written = self._writer.submit(lambda: self._write_mine(aside, writes))
            else:
                engine.save(aside)
                written = _finished(self._summarise_mine(aside))
        except (OSError, RuntimeError) as error:  # the other ranks wait inside DeepSpeed: end them by ending
            if is_consequence(error):  # no fault of the disk: another rank ended meanwhile
                raise
            raise self._fault(aside, f"rank {self._world.rank}: {error}") from error
        self._pending = _Pending(aside, final, whole, written)
        if wait or not self._config.asynchronous:
            self.finish()
        return final

    def poll(self) -> None:
        """Publish the checkpoint being written if every rank has written its part. Collective; call it now and then."""
        if self._pending is not None and all(self._world.gather(self._pending.written.done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written, if there is one, and publish it. Collective.

        Raises:
            CheckpointError: a rank could not write its files, on every rank alike.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.written.exception()  # waits
        mine = f"rank {self._world.rank}: {error}" if error else pending.written.result()
        parts = self._world.gather(mine)
        faults = [part for part in parts if isinstance(part, str)]
        if faults:
            raise self._fault(pending.aside, "; ".join(faults)) from error
        manifest = {name: entry for part in parts for name, entry in part.items()}
        self._world.from_main(lambda: self._publish(pending.aside, pending.final, manifest, pending.state))

    def _write_mine(self, aside: Path, writes: Sequence[Callable[[], None]]) -> dict[str, tuple[int, int]]:
        for write in writes:
            write()
        return self._summarise_mine(aside)

    def _fault(self, aside: Path, what: str) -> CheckpointError:
        return CheckpointError(
            f"could not write {aside}: {what}. The newest whole checkpoint is {self._newest()}; make room (or repair "
            "the disk) and start the same command again"
        )

    def _prepare(self, aside: Path, expected_bytes: int) -> str | None:
        """Make room aside; tells what is lacking, if anything."""
        _make_empty(aside)
        free = shutil.disk_usage(aside).free
        if free - expected_bytes >= self._config.min_free_gb * 1e9:
            return None
        aside.rmdir()
        return (
            f"{self._folder} has {free / 1e9:.2f} GB free, the checkpoint takes about {expected_bytes / 1e9:.2f} and "
            f"checkpoint.min_free_gb={self._config.min_free_gb} are to stay; make room or lower checkpoint.keep"
        )

    def _summarise_mine(self, aside: Path) -> dict[str, tuple[int, int]]:
        """Flush the files that this rank wrote to disk: name -> (bytes, checksum)."""
        entries = {}
        for path in sorted(aside.rglob("*")):
            found = _RANK_OF_FILE.search(path.name)
            if path.is_file() and (int(found.group(1)) if found else 0) == self._world.rank:
                flush_to_disk(path)
                entries[str(path.relative_to(aside))] = (path.stat().st_size, checksum(path))
        return entries

    def _publish(self, aside: Path, final: Path, manifest: dict[str, tuple[int, int]], state: dict[str, Any]) -> None:
        for name, (size, _) in manifest.items():  # another rank wrote it; is it here, too?
            if not (aside / name).is_file() or (aside / name).stat().st_size != size:
                raise CheckpointError(
                    f"{aside / name}, which another rank wrote with {size} bytes, is not so on {socket.gethostname()}: "
                    "run_dir must lie on a file system that all nodes share. The newest whole checkpoint is "
                    f"{self._newest()}"
                )
        write_json(aside / "state.json", state)
        path = aside / "state.json"
        write_json(aside / "manifest.json", manifest | {"state.json": (path.stat().st_size, checksum(path))})
        for folder in {aside, *((aside / name).parent for name in manifest)}:
            flush_to_disk(folder)
        self._name(aside, final)
        write_whole(self._folder / "latest", final.name)
        self._prune(final)

    def _name(self, aside: Path, final: Path) -> None:
        """Give what lies flushed in `aside` its name; one of that name is `.replaced-*` until it is removed."""
        if final.exists():  # a step done again after a resume from an earlier one
            replaced = final.with_name(f".replaced-{final.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        aside.rename(final)
        flush_to_disk(self._folder)

    def _prune(self, newest: Path) -> None:
        every = self._config.keep_every
        stale = [path for path in self._steps() if path.name > newest.name]
        recent = [path for path in self._steps() if path.name <= newest.name]
        old = [path for path in recent[: -self._config.keep] if not every or _step_of(path) % every]
        leftovers = (path for kind in ("replaced", "abandoned") for path in self._folder.glob(f".{kind}-*"))
        for path in (*stale, *old, *leftovers):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """Nothing depends on it: on network disks, a file that another process holds open keeps its folder alive."""
        try:
            shutil.rmtree(path)
        except OSError as error:
            self._warn(f"{path} could not be removed, training goes on ({error}); remove it by hand")

    def _steps(self) -> list[Path]:
        return sorted(self._folder.glob("step-????????"))

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of `step` is here under its name."""
        return (self._folder / f"step-{step:08d}").is_dir()

    def _newest(self) -> str:
        return str(max(self._steps(), default="none yet"))

    def discard(self) -> None:
        """Remove every checkpoint: the stage starts anew. Collective."""
        self._world.from_main(lambda: shutil.rmtree(self._folder, ignore_errors=True))

    def find(self, resume: str, before: int | None = None) -> Path | None:
        """The checkpoint to continue from: "auto" the newest whole one or None, else that path, verified. Collective.

        `before` passes over those of this step and later ones.

        Raises:
            CheckpointError: the named checkpoint is not whole, or there are some and none is.
        """
        self.finish()
        candidates = self._world.from_main(lambda: self._candidates(resume))
        if before is not None:
            candidates = [path for path in candidates if _step_of(path) < before]
        for path in candidates:
            fault = self.fault_of(path)
            if fault is None:
                return path
            if resume != "auto":
                raise CheckpointError(f"resume={resume}: {fault}")
            self._warn(f"{path} is passed over: {fault}")
        if candidates:  # to begin anew would throw away what may still be repaired
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoint(s) in {self._folder} is whole (the newest: "
                f"{self.fault_of(candidates[0])}). Restore one from a copy and start the same command again, or "
                f"{self._anew()}"
            )
        return None

    def _candidates(self, resume: str) -> list[Path]:
        for pattern in (".writing-*", ".universal-*"):  # leftovers of a run that was killed meanwhile
            for leftover in self._folder.glob(pattern):
                self._remove(leftover)
        for replaced in self._folder.glob(".replaced-*"):  # killed between the two renames: the old one is still whole
            original = replaced.with_name(replaced.name.removeprefix(".replaced-"))
            if original.exists():
                self._remove(replaced)
            else:
                replaced.rename(original)
        return self._steps()[::-1] if resume == "auto" else [Path(resume)]

    def fault_of(self, path: Path) -> str | None:
        """What is wrong with the checkpoint at `path` on any rank; None when it is whole on all. Collective.

        Every rank looks for every file (is the disk shared?) and checks the content of its share.
        """
        faults = self._world.gather(fault_of(path, self._world.rank, self._world.size))
        found = [f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault]
        return found[0] if found else None

    def load(self, engine: Engine, path: Path) -> dict[str, Any]:
        """Restore `engine` from `path`, written by any number of ranks, and return the state saved with it. Collective.

        Another world size goes through DeepSpeed's universal checkpoint: rank 0 converts (into the store's own
        folder; see `conversion` for what it takes), all ranks load, the copy is removed. Checkpoints of later steps
        belong to a course that is left: they are set aside, and removed when the next one is written.

        Raises:
            CheckpointError: another ZeRO stage or precision wrote it, the conversion failed, or one from elsewhere
                could not be copied here; what "auto" finds is then as before.
        """
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state["engine"] != engine.signature:
            raise CheckpointError(
                f"{path} was written with {state['engine']}, this run has {engine.signature}: use the same engine "
                f"settings, or {self._anew()}"
            )
        if state["world"] == self._world.size or not engine.partitioned:
            engine.load(path)
        else:
            converted = self._folder / f".universal-{path.name}"
            self._world.from_main(lambda: self._convert(path, converted))
            engine.load_universal(converted, path)
            self._world.barrier()  # every rank has read it
            self._world.from_main(lambda: self._remove(converted))
        self._world.from_main(lambda: self._go_on_from(path, state["step"]))
        return state

    def _go_on_from(self, path: Path, step: int) -> None:
        """Make `path` what "auto" finds from now on: no later one is left, and one from elsewhere is here, too.

        At each moment a whole checkpoint is here for "auto": the old course's newest up to the last rename, then
        `path`. What takes long, and may find no room, comes before anything is set aside.
        """
        final = self._folder / f"step-{step:08d}"
        here = path.resolve() == final.resolve()
        if not here:
            self._bring(path, final)
        write_whole(self._folder / "latest", final.name)
        stale = [other for other in self._steps() if other > final or (other < final and not here)]
        for left in (*self._folder.glob(f".replaced-{final.name}"), *stale):  # the newest last
            own = left.with_name(left.name.removeprefix(".replaced-"))
            abandoned = left.with_name(f".abandoned-{own.name}")
            shutil.rmtree(abandoned, ignore_errors=True)
            left.rename(abandoned)
            self._warn(f"{own} is of the course that is left: set aside as {abandoned.name} until the next save")

    def _bring(self, path: Path, final: Path) -> None:
        """Link or copy the checkpoint `path` to `final`, aside and flushed first as one that is written."""
        aside = self._folder / f".writing-{final.name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            for source in (path, *sorted(path.rglob("*"))):
                copy = aside / source.relative_to(path)
                if source.is_dir():
                    copy.mkdir(parents=True)
                else:
                    _link(source, copy)
            for copy in (*aside.rglob("*"), aside):
                flush_to_disk(copy)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"resume={path} could not be copied to {self._folder}: {error}. The checkpoints there are as before; "
                "make room (or repair the disk) and start the same command again"
            ) from error
        self._name(aside, final)

    def _anew(self) -> str:
        """How to start this stage, and no other of the chain, from its beginning."""
        return f"start the stage anew with stage={self._folder.parent.name} resume=none"

    def _convert(self, path: Path, converted: Path) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            convert(path, converted)
        except (ConversionError, OSError) as error:
            raise CheckpointError(
                f"{path} could not be converted to this number of ranks: {error}\nOr start as many ranks as wrote it "
                f"({path / 'state.json'}: world), or {self._anew()}"
            ) from error


def _finished(part: dict[str, tuple[int, int]]) -> Future[dict[str, tuple[int, int]]]:
    future: Future[dict[str, tuple[int, int]]] = Future()
    future.set_result(part)
    return future


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is never written again; a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
