"""The plan from a process of its own, steps ahead of need: whoever trains receives its packs and never waits for them.

Enters: what plans the steps behind a state. Leaves: per global step this rank's packs, and the plan's state behind it:
about 30 KB a pack of 300 documents, where planning the step on 1,024 ranks takes most of a second. The process is
ahead by 1 MiB of steps, and by one step at least. One that died or hangs is replaced and goes on behind the last step
received, so the packs stay the same.

Each rank has its own. One for all ranks of a node would save the others a core's share, but they would then have to
meet (a name and a secret agreed on, a loader has neither), fail, stop and go back together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.pack.feed import Feed, Watch
from data_pipelines.plan.planner import Pack
from data_pipelines.samples import LedgerEvent

_AHEAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One global step: `packs` of this rank in slot order, and the plan's `state` after all ranks' packs of it."""

    packs: tuple[Pack, ...]
    state: dict[str, Any]


PlanSteps = Callable[[dict[str, Any]], Iterator[PlannedStep]]


class PlanProcess:
    """The steps that `plan_steps(state)` gives, made in a process of their own.

    Raises (from `take`):
        UserError: as the planner. RuntimeError: a defect, with its traceback; deaths without a step.
        ShardError: no step in `stall_s`, twice in a row.
    """

    def __init__(self, plan_steps: PlanSteps, state: dict[str, Any], stall_s: float) -> None:
        def steps(watch: Watch) -> Iterator[PlannedStep]:
            watch(f"the packs from {self._state['number']} on")
            for step in plan_steps(self._state):
                yield step
                watch(f"the packs from {step.state['number']} on")

        self._state = state
        self.feed = Feed(steps, "data-planner", "plans the packs", stall_s, _AHEAD_BYTES)

    def take(self) -> PlannedStep | None:
        """The next step; None: it is not planned yet."""
        taken = self.feed.take()
        if taken is None:
            return None
        step, ends = taken
        self._state = step.state
        if not ends:
            return step
        first, *others = step.packs
        message = "the process that plans the packs {} and was replaced; the plan is the same"
        key = f"pack {first.number}"
        notes = [LedgerEvent("", key, "worker_replaced", message.format(end)) for end in ends]
        return replace(step, packs=(replace(first, events=(*notes, *first.events)), *others))

    def close(self) -> None:
        """End the process."""
        self.feed.close()
