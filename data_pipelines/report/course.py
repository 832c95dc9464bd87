"""The course a run's plan took: whether a pack's number, the settings and the seed alone still tell what it held.

Enters: the folder of a stage. Leaves: `Course`: from which state to plan a pack, which step had it, and refusals where
the folder no longer tells. Three things bend a course: an accepted change of data (`data_changes.jsonl`, with the
loader's state under the new settings), a return after a loss spike (`spikes.jsonl`), and steps of another size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.plan.change import CHANGES_NAME
from data_pipelines.report.data_run import choose_stage, read_settings, settings_of_stage
from data_pipelines.whole import read_lines

FAR = 4  # times the packs that are known of: spikes and lower fills move the end, but not so far


@dataclass(frozen=True)
class Change:
    """After `step` steps the run went on with other data, from pack `pack` and the loader's state `loader`."""

    step: int
    pack: int
    changes: Sequence[str]
    loader: Mapping[str, Any]


BEGINNING = Change(0, 0, (), {})


@dataclass(frozen=True)
class Course:
    """A stage's accepted changes and spikes, oldest first, and how many packs it has at least (0: not known).

    `saved`: the step of the newest checkpoint and the number of the pack after it.
    """

    stage: str = ""
    changes: Sequence[Change] = ()
    spikes: Sequence[Mapping[str, Any]] = ()
    packs: int = 0
    saved: tuple[int, int] | None = None

    def first_pack(self, step: int, packs_per_step: int) -> int:
        """The number of the first pack of `step` (from 1).

        Raises:
            UserError: the run went back after a spike, or its steps had another size: the step had other packs than
                its number says.
        """
        base = next((change for change in reversed(self.changes) if change.step < step), BEGINNING)
        for spike in self._spikes_since(base.pack):
            if step > spike["returned_to"]:
                raise UserError(
                    f"--step {step}: the run went back from step {spike['step']} to {spike['returned_to']} and on with "
                    "other packs; ask for --pack K (spikes.jsonl and the ledger name packs by number)"
                )
        if self._other_sizes(base, packs_per_step):
            raise UserError(
                f"--step {step}: not all steps of the run had packs_per_step={packs_per_step} packs (pack "
                f"{self.saved and self.saved[1]} follows step {self.saved and self.saved[0]}); ask for --pack K"
            )
        first = base.pack + (step - 1 - base.step) * packs_per_step
        later = min((change.pack for change in self.changes if change.step >= step), default=first + 1)
        return min(first, later - 1)  # steps before a change may have had another number of packs

    def step_of(self, pack: int, packs_per_step: int) -> tuple[int, int] | None:
        """The step that had pack number `pack`, and that step's first pack; None where the number no longer tells."""
        base = next((change for change in reversed(self.changes) if change.pack <= pack), BEGINNING)
        before = (pack - base.pack) // packs_per_step
        step = base.step + before + 1
        moved = any(step > spike["returned_to"] for spike in self._spikes_since(base.pack))
        if moved or self._other_sizes(base, packs_per_step):
            return None
        return step, base.pack + before * packs_per_step

    def start(self, pack: int, given: int | None = None) -> Change | None:
        """Where to begin to plan up to `pack`: a change, or None for the beginning, or the state `given` by its pack.

        Raises:
            UserError: the pack was planned under settings that a later change replaced.
        """
        newest = next((change for change in reversed(self.changes) if change.pack <= pack), None)
        if given is not None and (newest is None or given > newest.pack):
            return None
        if newest is not (self.changes[-1] if self.changes else None):
            last = self.changes[-1]
            state = f", with --state the state.json of a checkpoint from pack {newest.pack} on" if newest else ""
            raise UserError(
                f"pack {pack} was planned before the data changed at pack {last.pack}, after step {last.step} "
                f"({'; '.join(last.changes)}), and the run's folder keeps the settings since then. Give those of "
                f"before: qwen2vl show OVERRIDES --stage {self.stage} --pack {pack}{state}"
            )
        return newest

    def check_reach(self, pack: int) -> None:
        """Refuse a pack that the run will hardly come to.

        Raises:
            UserError: with the number of packs that are known of.
        """
        if self.packs and pack > FAR * self.packs:
            raise UserError(
                f"pack {pack:,} lies far beyond the run, which is known to have {self.packs:,} packs (counted from 0): "
                "give the number as the ledger, spikes.jsonl or an error names it"
            )

    def _other_sizes(self, base: Change, packs_per_step: int) -> bool:
        """Whether steps since `base` had another number of packs: `resume=PATH` may change it."""
        if self.saved is None or self.saved[0] <= base.step or any(self._spikes_since(base.pack)):
            return False
        step, pack = self.saved
        return pack != base.pack + (step - base.step) * packs_per_step

    def _spikes_since(self, pack: int) -> Iterator[Mapping[str, Any]]:
        """Spikes after which the run went back, behind `pack`."""
        for spike in self.spikes:
            packs = [row["pack"] for row in spike.get("packs", ())]
            if spike.get("returned_to") is not None and max(packs, default=pack) >= pack:
                yield spike


def read_course(config: Path, stage: str | None, packs_per_step: int) -> Course:
    """What the run's folder at `config` (or its config.json) tells of a stage; nothing where it is no run's.

    Raises:
        UserError: no such stage.
    """
    path, settings = read_settings(config)
    if "stages" not in settings:
        return Course()
    name = choose_stage(settings, stage, path)
    folder = path.parent / name
    changes = [Change(**line) for line in read_lines(folder / CHANGES_NAME)]
    steps = settings_of_stage(settings, name, path)["stages"][name].get("steps")
    steps = int(steps or 0) or _steps_done(folder)
    return Course(name, changes, list(read_lines(folder / "spikes.jsonl")), steps * packs_per_step, _saved(folder))


def _saved(folder: Path) -> tuple[int, int] | None:
    """The step and the next pack of the stage's newest checkpoint; None where there is none, or not of a plan."""
    for path in sorted(folder.glob("checkpoints/step-????????/state.json"), reverse=True)[:1]:
        with suppress(ValueError, KeyError):  # damaged, or of a stream
            state = json.loads(path.read_text(encoding="utf-8"))
            return state["progress"]["step"], state["loader"]["plan"]["number"]
    return None


def _steps_done(folder: Path) -> int:
    """Of a stage whose length is counted in tokens: the newest step that its checkpoints or the log know of."""
    saved = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-????????")]
    logged = (line["step"] for line in read_lines(folder.parent / "metrics.jsonl") if line.get("stage") == folder.name)
    return max(max(saved, default=0), max(logged, default=0))
