"""What a source says of its data before any medium is opened: an `Item` is one document to be.

Every importer reduces its format to these few kinds of annotation; `compose` turns them into messages, alike for all
formats. Coordinates are pixels of the picture as the annotator saw it (see `pictures.Picture` for EXIF).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.samples import LedgerEvent, MediaKind

Box = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MediaSource:
    """Where the bytes of one picture or clip lie: a file, a slice of one (a tar's member), or memory.

    `size` (width, height) is what the source's annotations say the picture measures, None where they do not say;
    with `relative`, coordinates are fractions (0..1) of the displayed picture instead of pixels.
    """

    name: str
    kind: MediaKind
    path: Path | None = None
    offset: int = 0
    length: int | None = None
    data: bytes | None = None
    size: tuple[int, int] | None = None
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Labelled:
    """A phrase and its boxes (x1, y1, x2, y2). `crowd` marks a box around many objects: never asked for singly."""

    phrase: str
    boxes: tuple[Box, ...]
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line of text in a picture and its quad (x1, y1, ..., x4, y4); `text` None where only the place is known."""

    text: str | None
    quad: Box


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its short answer; `choices` where the source asks to choose."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grounded:
    """A caption in which spans (start, end, boxes) name things: characters start..end of `caption` lie at `boxes`."""

    caption: str
    spans: tuple[tuple[int, int, tuple[Box, ...]], ...]


@dataclass(frozen=True, slots=True)
class Annotations:
    """Everything a source says of one document's media. Empty fields are what it does not say.

    captions    descriptions of the whole       grounded   captions whose phrases have boxes
    objects     labelled objects, all of them   referring  phrase → box, each phrase meaning exactly its boxes
    regions     box → description               lines      text with quads
    words       a transcription without places  fields     named values in a document picture (company, date)
    questions   question → short answer         label      class of the picture
    messages    a conversation in record form, its media parts naming a media item by number ("0", "1", ...)
    """

    captions: tuple[str, ...] = ()
    grounded: tuple[Grounded, ...] = ()
    objects: tuple[Labelled, ...] = ()
    referring: tuple[Labelled, ...] = ()
    regions: tuple[Labelled, ...] = ()
    lines: tuple[TextLine, ...] = ()
    words: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    questions: tuple[Question, ...] = ()
    label: str | None = None
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """One document to be. `key` is unique in its import, without a dot in its last part; `task` None: by content.

    `score` is the source's own measure of how well picture and text match; only the cleaning rules look at it.
    """

    key: str
    annotations: Annotations
    media: tuple[MediaSource, ...] = ()
    task: str | None = None
    score: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expected:
    """A source's word that about `count` entries follow, for the time left alone.

    They are those of the whole input, or of a part that is `share` of it (one file among several, by bytes).
    """

    count: int
    share: float = 1.0


Entry = Item | LedgerEvent | Expected
Entries = Iterator[Entry]


def problem(key: str, reason: str, message: str) -> LedgerEvent:
    """A ledger line for something a source could not turn into an item; the importer fills in the dataset's name."""
    return LedgerEvent("", key, reason, message)
