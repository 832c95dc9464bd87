"""What a stage writes down of single packs (ledger, skipped updates, spikes, changes of data), kept true on a resume.

Enters: the stage's folder and the loader's state in the checkpoint that is gone on from. Leaves: the files without the
lines of packs that are trained again, so that each stands in them once. Packs behind a spike are not trained again:
their lines stay. A change of data that a resume accepts is written down with the loader's state under the new settings
(64 KB at most): from it the packs that follow can be planned again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.plan.change import CHANGES_NAME
from data_pipelines.whole import append_lines, as_lines, read_lines, write_whole

_FILES = ("ledger-rank*.jsonl", "skipped_updates.jsonl", "spikes.jsonl", CHANGES_NAME)


class Record:
    """One of these files as a stage adds to it.

    Where the disk has no room, that is said once and the lines are lost: they must not cost the steps since the last
    checkpoint, and what they tell of is counted in `Progress`.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._told_of_disk = False

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append `lines`, all or none of them."""
        try:
            append_lines(self.path, lines)
        except OSError as error:
            if not self._told_of_disk:
                self._warn(f"{self.path} cannot be written, training goes on ({error}); make room or repair the disk")
            self._told_of_disk = True


def forget_packs(folder: Path, loader_state: Mapping[str, Any] | None) -> None:
    """Drop the lines of packs that follow `loader_state` (None: of all), and what is damaged: a killed run's half line.

    >>> next_pack({"plan": {"number": 12}}), next_pack({"stream": {"packs": 8}}), next_pack(None)
    (12, 8, 0)
    """
    first = next_pack(loader_state)
    for path in (path for form in _FILES for path in folder.glob(form)):
        kept = as_lines(line for line in read_lines(path) if _last_pack(line) < first)
        if kept != path.read_text(encoding="utf-8", errors="replace"):
            write_whole(path, kept)


def take_changes(folder: Path, checkpoint: Path) -> None:
    """The changes of data of another run whose `checkpoint` is gone on from are those of this one's packs, too."""
    origin = checkpoint.resolve().parent.parent
    if origin == folder.resolve() or not (origin / "settings.json").is_file():
        return
    (folder / CHANGES_NAME).unlink(missing_ok=True)
    if (origin / CHANGES_NAME).is_file():
        shutil.copyfile(origin / CHANGES_NAME, folder / CHANGES_NAME)


def add_change(folder: Path, step: int, loader_state: Mapping[str, Any], changes: Sequence[str]) -> None:
    """Write down that after `step` steps the data changed: what, and the loader's state to go on with."""
    line = {"step": step, "pack": next_pack(loader_state), "changes": list(changes), "loader": loader_state}
    append_lines(folder / CHANGES_NAME, [line])


def next_pack(loader_state: Mapping[str, Any] | None) -> int:
    """The number of the first pack that a loader in this state hands out."""
    if loader_state is None:
        return 0
    number: int = loader_state["plan"]["number"] if "plan" in loader_state else loader_state["stream"]["packs"]
    return number


def _last_pack(line: Mapping[str, Any]) -> int:
    """Of a line that stands for one pack, or (spikes) for those of a step."""
    return max((pack["pack"] for pack in line["packs"]), default=-1) if "packs" in line else int(line["pack"])
