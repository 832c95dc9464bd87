"""A plan that goes on with other data: what of its state stays, what begins anew.

Enters: a plan's state, and the sources before and now. Leaves: the state to go on with, and sentences that say what
restarts. Costs nothing: nothing is read.

Packs go on being numbered and tokens counted. A source whose shards are the same keeps its place. One that is new, or
whose shards changed, begins an epoch; its samples that waited for a pack are put back, since places in the old shards
mean nothing in the new ones. Shares are counted anew from here: counts of other weights would be made up for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.plan.mixture import Phase
from data_pipelines.plan.rows import fold, unfold
from data_pipelines.plan.shelf import Item

CHANGES_NAME = "data_changes.jsonl"  # in a stage's folder: the changes that a resume accepted, each with its new state


class SourceFacts(NamedTuple):
    """What a plan depends on of a source: its shards (number, and a hash of names and sizes) and its share, as text."""

    num_shards: int
    fingerprint: str
    share: str


def carry_over(
    state: Mapping[str, Any],
    before: Mapping[str, SourceFacts],
    now: Mapping[str, SourceFacts],
    phases: Sequence[Phase],
) -> tuple[dict[str, Any], list[str]]:
    """The state of a plan over the sources `now` that continues `state` over `before`, and what restarts.

    Both mappings are in the order of the sources' numbers; `phases` are those of the new plan.
    """
    numbers = {name: number for number, name in enumerate(now)}
    kept = {name for name in before if name in now and before[name][:2] == now[name][:2]}
    items, dropped = _carry_items(unfold(state["pool"].get("items", "")), list(before), numbers, kept)
    places = dict(zip(before, state["cursors"], strict=True))
    cursors, notes = [], []
    for name, facts in now.items():
        if name in kept:
            cursors.append(places[name])
        elif name in before:
            epoch = places[name]["place"][0]
            cursors.append(_beginning(epoch + 1))
            notes.append(
                f"source {name}: its shards changed ({before[name].num_shards} before, {facts.num_shards} now): it "
                f"begins epoch {epoch + 1} at once, which holds all its samples, those that epoch {epoch} gave already "
                f"and {dropped[name]} that waited for a pack"
            )
        else:
            cursors.append(_beginning(0))
            notes.append(f"source {name} is new: it begins its first epoch")
    for name in before:
        if name not in now:
            notes.append(f"source {name} is gone, with {dropped[name]} samples that waited for a pack")
    changed = [
        f"{name} {before[name].share} → {facts.share}"
        for name, facts in now.items()
        if name in before and before[name].share != facts.share
    ]
    if changed:
        notes.append(f"shares changed ([weight, epochs, schedule]: {'; '.join(changed)})")
    if [name for name in before if name in now] != [name for name in now if name in before]:
        notes.append("the sources stand in another order")
    if notes:
        notes.append("the mixture counts its shares anew from here")
    phase = sum(phase.from_tokens <= state["tokens"] for phase in phases) - 1
    pool = {**state["pool"], "items": fold(items)} if "items" in state["pool"] else state["pool"]
    # What waits counts as drawn: the packs from here on have the shares.
    own = len(items[0]) - len(Item._fields) if items else 0
    waiting = Counter(row[own] for row in items)
    shares = {"drawn": [waiting[number] for number in range(len(now))], "leads": [0.0] * len(now)}
    carried = {**state, "phase": phase, **shares, "cursors": cursors, "pool": pool}
    return (carried if notes else dict(state)), notes


def _beginning(epoch: int) -> dict[str, Any]:
    """A cursor's state before the first block of `epoch`."""
    return {"place": [epoch, 0, 0], "next": None}


def _carry_items(
    rows: Sequence[Sequence[int]], names: Sequence[str], numbers: Mapping[str, int], kept: set[str]
) -> tuple[list[list[int]], Counter[str]]:
    """The waiting samples of the `kept` sources under their new numbers; how many of each other source are dropped.

    A row ends with the fields of an `Item`; some packers put one of their own before them.
    """
    own = len(rows[0]) - len(Item._fields) if rows else 0
    items, dropped = [], Counter[str]()
    for row in rows:
        name = names[row[own]]
        if name in kept:
            items.append([*row[:own], numbers[name], *row[own + 1 :]])
        else:
            dropped[name] += 1
    return items, dropped
