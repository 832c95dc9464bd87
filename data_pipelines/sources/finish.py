"""Item → what a shard stores: media opened and upright, coordinates placed, messages composed, record validated.

Enters: an `Item`. Leaves: record JSON, media bytes by member name, and ledger events for every annotation that was
left out. An item that cannot be used raises; nothing of it is replaced by a guess. Costs about 0.2 ms a picture plus
the reading of its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.decode.record import parse_record
from data_pipelines.decode.regions import TOLERANCE_PIXELS
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.decode.written_record import grid_to_pixels
from data_pipelines.errors import DataError, RecordError
from data_pipelines.samples import LedgerEvent
from data_pipelines.sources.cleaning import RuleCount, Rules, clean
from data_pipelines.sources.compose import compose
from data_pipelines.sources.item import Annotations, Box, Grounded, Item, Labelled, MediaSource, TextLine, problem
from data_pipelines.sources.pictures import Picture, open_media, place
from data_pipelines.sources.sample import Sample


@dataclass(frozen=True, slots=True)
class Finished:
    """One sample, ready to be written; `events` tell what of its annotations was left out."""

    key: str
    record: dict[str, Any]
    media: dict[str, bytes]
    events: list[LedgerEvent]


@dataclass(frozen=True, slots=True)
class Treatment:
    """How items are finished: what probes clips, whether pictures are decoded to verify them, the cleaning rules and
    where they are counted.
    """

    clips: ClipDecoder
    verify: bool = False
    rules: Rules = ()
    counts: Sequence[RuleCount] = ()


def finish(item: Item, treatment: Treatment) -> Finished:
    """Make the sample of `item`.

    Raises:
        MediaError, RecordError: where a medium or the record as a whole is unusable; "no_annotation" where there is
            nothing to learn; the name of the cleaning rule that dropped it.
    """
    pictures = [open_media(source, item.key, treatment.clips, treatment.verify) for source in item.media]
    names = [f"{i}.{picture.extension}" for i, picture in enumerate(pictures)]
    events: list[LedgerEvent] = []
    annotations = item.annotations
    if pictures:
        annotations = _Placing(item, pictures[0], events).place(annotations)
        told = tuple(_place_regions(message, item, pictures) for message in annotations.messages)
        annotations = replace(annotations, messages=told)
    if treatment.rules:
        sample = Sample(item.key, annotations, tuple(picture.media for picture in pictures), item.score)
        cleaned = clean(sample, treatment.rules, treatment.counts)
        if isinstance(cleaned, str):
            raise RecordError(item.key, cleaned, "dropped by this cleaning rule")
        annotations = cleaned.annotations
    messages, task = compose(annotations, list(zip(names, (s.kind for s in item.media), strict=True)), item.task)
    if not messages:
        raise RecordError(item.key, "no_annotation", "nothing to learn: no caption, box, text, question or answer")
    record = {"task": task, "messages": messages, **item.extra}
    if pictures:
        record["media"] = {name: picture.facts() for name, picture in zip(names, pictures, strict=True)}
    _validate(item.key, record, names)
    return Finished(item.key, record, {n: p.data for n, p in zip(names, pictures, strict=True)}, events)


def _validate(key: str, record: dict[str, Any], names: list[str]) -> None:
    """Read the record back as a trainer will: what it would refuse never reaches a shard."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError as error:  # NaN, or a lone surrogate (UnicodeEncodeError is one)
        raise RecordError(key, "bad_text", f"cannot be written as UTF-8 JSON: {error}") from error
    parse_record(key, {"json": text, **dict.fromkeys(names)})


class _Placing:
    """Moves one item's coordinates onto its stored picture and leaves out, with an event, what does not lie on it."""

    def __init__(self, item: Item, picture: Picture, events: list[LedgerEvent]) -> None:
        self._item = item
        self._picture = picture
        self._events = events

    def place(self, annotations: Annotations) -> Annotations:
        """The annotations with their boxes in the picture as displayed; what cannot be placed is left out and told."""
        grounded, captions = [], list(annotations.captions)
        for entry in annotations.grounded:
            placed = ((start, stop, self._boxes("grounded", boxes)) for start, stop, boxes in entry.spans)
            spans = tuple(span for span in placed if span[2])
            if spans:
                grounded.append(Grounded(entry.caption, spans))
            elif entry.caption not in captions:
                captions.append(entry.caption)  # without a box left, it is a caption like any other
        return replace(
            annotations,
            captions=tuple(captions),
            grounded=tuple(grounded),
            objects=self._labelled("objects", annotations.objects),
            referring=self._labelled("referring", annotations.referring),
            regions=self._labelled("regions", annotations.regions),
            lines=self._lines(annotations.lines),
        )

    def _labelled(self, field: str, listed: tuple[Labelled, ...]) -> tuple[Labelled, ...]:
        kept = []
        for i, labelled in enumerate(listed):
            boxes = self._boxes(f"{field}[{i}]", labelled.boxes)
            # A phrase that means several things must keep them all: one box fewer would be a wrong answer.
            if boxes and (field != "referring" or len(boxes) == len(labelled.boxes)):
                kept.append(replace(labelled, boxes=boxes))
        return tuple(kept)

    def _lines(self, lines: tuple[TextLine, ...]) -> tuple[TextLine, ...]:
        kept = []
        for i, line in enumerate(lines):
            if line.text is not None and not line.text.strip():
                self._leave_out("empty_text", f"lines[{i}]", line.text)
                continue
            quad = self._fit(f"lines[{i}].quad", line.quad)
            if quad is not None:
                kept.append(replace(line, quad=quad))
        return tuple(kept)

    def _boxes(self, field: str, boxes: tuple[Box, ...]) -> tuple[Box, ...]:
        fitted = (self._fit(f"{field}.boxes[{i}]", box) for i, box in enumerate(boxes))
        return tuple(box for box in fitted if box is not None)

    def _fit(self, field: str, points: Box) -> Box | None:
        """The coordinates on the stored picture, at most a pixel outside moved to its border; None: left out."""
        placed = place(self._picture, points, self._item.media[0], self._item.key)
        width, height = self._picture.size
        right, bottom = width + TOLERANCE_PIXELS, height + TOLERANCE_PIXELS
        inside = all(-TOLERANCE_PIXELS <= x <= right for x in placed[0::2]) and all(
            -TOLERANCE_PIXELS <= y <= bottom for y in placed[1::2]
        )
        if not inside:  # NaN and infinity compare false and land here
            self._leave_out("bad_box", field, f"{points} outside {width} x {height} pixels")
            return None
        limits = (float(width), float(height))
        moved = tuple(min(max(0.0, value), limits[i % 2]) for i, value in enumerate(placed))
        empty = (
            moved[2] <= moved[0] or moved[3] <= moved[1]
            if len(moved) == 4
            else max(moved[0::2]) <= min(moved[0::2]) or max(moved[1::2]) <= min(moved[1::2])
        )
        if empty:
            self._leave_out("bad_box", field, f"{points} has no area, or its corners are reversed")
            return None
        return moved

    def _leave_out(self, reason: str, field: str, what: str) -> None:
        self._events.append(problem(self._item.key, reason, f"{field} left out: {what}"))


def _place_regions(message: dict[str, Any], item: Item, pictures: list[Picture]) -> dict[str, Any]:
    """The regions of a conversation on the stored picture, those marked "grid" from cells of the 0..1000 grid.

    Their bounds are checked when the record is read back: a region that is wrong is part of an answer, and cannot be
    left out alone.
    """
    content = message["content"]
    if not isinstance(content, list) or not any(part.get("type") == "region" for part in content):
        return message
    parts = []
    for part in content:
        if part.get("type") == "region" and ("image" in part or len(pictures) == 1):
            number = int(part.get("image", 0))
            part, on_grid = {**part}, part.get("grid", False)
            part.pop("grid", None)
            for field in ("boxes", "quads"):
                if field in part:
                    part[field] = [
                        _pixels(points, on_grid, pictures[number], item.media[number], item.key)
                        for points in part[field]
                    ]
        parts.append(part)
    return {**message, "content": parts}


def _pixels(points: list[float], on_grid: bool, picture: Picture, source: MediaSource, key: str) -> list[float]:
    return grid_to_pixels(points, picture.size) if on_grid else list(place(picture, tuple(points), source, key))


def attempt(item: Item, treatment: Treatment) -> tuple[Finished | None, list[LedgerEvent]]:
    """`finish`, with an unusable item as its ledger line."""
    try:
        finished = finish(item, treatment)
    except DataError as error:
        return None, [problem(item.key, error.reason, error.message)]
    return finished, finished.events
