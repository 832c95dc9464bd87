"""Rules on boxes: boxes inside boxes, boxes too small to mean anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from data_pipelines.errors import UserError
from data_pipelines.sources.item import Box, Grounded, Labelled
from data_pipelines.sources.sample import Sample


def _filter(sample: Sample, keep: Callable[[Box], bool]) -> Sample:
    """The sample without the boxes that are not to be kept, and without phrases that lost all of theirs.

    A grounded caption without any box left goes on as a plain one. A referring expression or a region loses its
    question with its first box: fewer boxes would be a wrong answer.
    """
    told = sample.annotations

    def some(listed: Iterable[Labelled]) -> tuple[Labelled, ...]:
        left = (replace(entry, boxes=tuple(box for box in entry.boxes if keep(box))) for entry in listed)
        return tuple(entry for entry in left if entry.boxes)

    def whole(listed: Iterable[Labelled]) -> tuple[Labelled, ...]:
        return tuple(entry for entry in listed if all(keep(box) for box in entry.boxes))

    grounded, captions = [], list(told.captions)
    for entry in told.grounded:
        spans = ((start, end, tuple(box for box in boxes if keep(box))) for start, end, boxes in entry.spans)
        kept = tuple(span for span in spans if span[2])
        if kept:
            grounded.append(Grounded(entry.caption, kept))
        elif entry.caption not in captions:
            captions.append(entry.caption)  # without a box left, it is a caption like any other
    return sample.having(
        captions=tuple(captions),
        objects=some(told.objects),
        referring=whole(told.referring),
        regions=whole(told.regions),
        grounded=tuple(grounded),
    )


@dataclass(frozen=True)
class MinBoxSide:
    """Drop boxes with a side below `pixels` pixels."""

    pixels: float = 2.0

    def apply(self, sample: Sample) -> Sample | None:
        """The sample without such boxes."""
        return _filter(sample, lambda box: min(box[2] - box[0], box[3] - box[1]) >= self.pixels)


@dataclass(frozen=True)
class NestedBoxes:
    """Drop boxes until none lies inside another, keeping as many as a greedy choice can (Qwen-VL on GRIT).

    A box lies inside another where at least `inside` of its area does. The box with most such relations goes first, of
    equals the larger one; so of one box around three, the one goes and the three stay. Equal boxes do not nest.
    """

    inside: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.inside <= 1:
            raise UserError(f"nested_boxes.inside = {self.inside}: needs a share in (0, 1]")

    def apply(self, sample: Sample) -> Sample | None:
        """The sample without nested boxes."""
        told = sample.annotations
        boxes = {box for entry in (*told.objects, *told.referring) for box in entry.boxes}
        boxes |= {box for entry in told.grounded for _, _, listed in entry.spans for box in listed}
        kept = self.choose(sorted(boxes))
        return _filter(sample, lambda box: box in kept or box not in boxes)

    def choose(self, boxes: list[Box]) -> set[Box]:
        """The boxes that stay. Quadratic in their number."""
        related: dict[Box, set[Box]] = {box: set() for box in boxes}
        for i, one in enumerate(boxes):
            for other in boxes[i + 1 :]:
                if self._nested(one, other):
                    related[one].add(other)
                    related[other].add(one)
        while True:
            worst = max(related, key=lambda box: (len(related[box]), _area(box), box), default=None)
            if worst is None or not related[worst]:
                return set(related)
            for other in related.pop(worst):
                related[other].discard(worst)

    def _nested(self, one: Box, other: Box) -> bool:
        width = min(one[2], other[2]) - max(one[0], other[0])
        height = min(one[3], other[3]) - max(one[1], other[1])
        if width <= 0 or height <= 0:
            return False
        return width * height >= self.inside * min(_area(one), _area(other))


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
