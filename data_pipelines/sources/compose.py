"""Annotations → messages: every task that a picture's annotations support, in one document.

Enters: `Annotations` whose coordinates are already pixels of the stored picture, and the member names of the media.
Leaves: messages in record form and the task's name. The media open the first user turn; every annotation is a question
and its answer in Qwen-VL's words (`decode.prompts`), because supervised tokens per pass of the vision transformer are
what teaches. Nothing is sampled: the same annotations give the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines.decode import prompts
from data_pipelines.samples import MediaKind
from data_pipelines.sources.item import Annotations, Box, Grounded, Labelled

Part = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer as content parts; `task` names the kind."""

    task: str
    question: tuple[Part, ...]
    answer: tuple[Part, ...]


def compose(
    annotations: Annotations, media: Sequence[tuple[str, MediaKind]], task: str | None
) -> tuple[list[dict[str, Any]], str]:
    """Messages of the document and its task: `task`, or the first of its turns' most specific kind.

    An empty list means that the annotations hold nothing to learn. A conversation in the annotations comes last; where
    it stands alone, it says itself where its media go.
    """
    turns = list(_turns(annotations, media[0][1] if media else "image"))
    opening = [media_part(name, kind) for name, kind in media]
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages.append({"role": "user", "content": [*opening, *turn.question]})
        messages.append({"role": "assistant", "content": list(turn.answer)})
        opening = []
    messages += _conversation(annotations.messages, [name for name, _ in media], placed=bool(turns))
    return messages, task or _document_task([turn.task for turn in turns])


def media_part(name: str, kind: MediaKind) -> Part:
    """The part that shows the media member `name`."""
    return {"type": kind, kind: name}


def text_part(words: str) -> Part:
    """A part of plain text."""
    return {"type": "text", "text": words}


def region_part(phrase: str | None, boxes: Sequence[Box] = (), quads: Sequence[Box] = ()) -> Part:
    """A part that writes a phrase, boxes or quads of the document's only picture."""
    part: Part = {"type": "region"}
    if phrase is not None:
        part["phrase"] = phrase
    if boxes:
        part["boxes"] = [list(box) for box in boxes]
    if quads:
        part["quads"] = [list(quad) for quad in quads]
    return part


def _turns(annotations: Annotations, kind: MediaKind) -> Iterator[Turn]:
    for i, caption in enumerate(annotations.captions):
        asked = prompts.another_caption(caption) if i else prompts.caption(caption)
        if kind == "video":
            asked = prompts.another_caption(caption) if i else prompts.video_caption(caption)
        yield Turn("video" if kind == "video" else "caption", (text_part(asked),), (text_part(caption),))
    for i, grounded in enumerate(annotations.grounded):
        prompt = prompts.another_caption if i else prompts.caption
        asked = prompt(grounded.caption, grounding=True)
        yield Turn("grounded_caption", (text_part(asked),), _grounded_parts(grounded))
    if annotations.objects:
        yield Turn("grounded_caption", (text_part(prompts.OBJECTS),), _object_parts(annotations.objects))
    for labelled in annotations.referring:
        yield Turn("referring", (region_part(labelled.phrase),), (region_part(None, labelled.boxes),))
    for labelled in annotations.regions:
        place = (region_part(prompts.THIS, labelled.boxes), text_part(prompts.IS))
        yield Turn("region", place, (text_part(labelled.phrase),))
    lines = [(line.text, line.quad) for line in annotations.lines if line.text is not None]
    if lines:
        answer = tuple(region_part(text, quads=(quad,)) for text, quad in lines)
        yield Turn("ocr", (text_part(prompts.OCR),), answer)
    elif annotations.lines:
        quads = [line.quad for line in annotations.lines]
        yield Turn("ocr", (text_part(prompts.TEXT_PLACES),), (region_part(None, quads=quads),))
    if annotations.words is not None:
        yield Turn("ocr", (text_part(prompts.READ),), (text_part(annotations.words),))
    if annotations.fields:
        asked = prompts.fields([name for name, _ in annotations.fields])
        values = json.dumps(dict(annotations.fields), ensure_ascii=False)
        yield Turn("ocr", (text_part(asked),), (text_part(values),))
    if annotations.label is not None:
        yield Turn("classification", (text_part(prompts.CLASS),), (text_part(annotations.label),))
    for question in annotations.questions:
        asked = (
            prompts.choose(question.question, question.choices) if question.choices else prompts.vqa(question.question)
        )
        yield Turn("vqa", (text_part(asked),), (text_part(question.answer),))


def _grounded_parts(grounded: Grounded) -> tuple[Part, ...]:
    """The caption with its spans as regions: "a ", region "dog", " runs". Spans inside a span already told are left."""
    parts: list[Part] = []
    end = 0
    for start, stop, boxes in sorted(grounded.spans, key=lambda span: (span[0], -span[1])):
        if start < end or start >= stop:
            continue
        if grounded.caption[end:start]:
            parts.append(text_part(grounded.caption[end:start]))
        parts.append(region_part(grounded.caption[start:stop], boxes))
        end = stop
    if grounded.caption[end:]:
        parts.append(text_part(grounded.caption[end:]))
    return tuple(parts)


def _object_parts(objects: Sequence[Labelled]) -> tuple[Part, ...]:
    """One region per label with all its boxes, in order of first appearance, separated by ", "."""
    grouped: dict[str, list[Box]] = {}
    for labelled in objects:
        grouped.setdefault(labelled.phrase, []).extend(labelled.boxes)
    parts: list[Part] = []
    for phrase, boxes in grouped.items():
        if parts:
            parts.append(text_part(", "))
        parts.append(region_part(phrase, boxes))
    return tuple(parts)


def unique_objects(objects: Sequence[Labelled]) -> tuple[Labelled, ...]:
    """The objects whose label occurs exactly once, without crowds: a label that can be asked "where is it?"."""
    counts: dict[str, int] = {}
    for labelled in objects:
        counts[labelled.phrase] = counts.get(labelled.phrase, 0) + len(labelled.boxes)
    return tuple(labelled for labelled in objects if counts[labelled.phrase] == 1 and not labelled.crowd)


def _conversation(messages: Sequence[dict[str, Any]], names: Sequence[str], placed: bool) -> list[dict[str, Any]]:
    """The conversation with media numbers replaced by member names; media that already stand are not shown again."""
    told: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [_named(part, names) for part in content if not (placed and part["type"] in ("image", "video"))]
        if not (placed and message["role"] == "system"):
            told.append({"role": message["role"], "content": content})
    return told


def _named(part: Part, names: Sequence[str]) -> Part:
    for field in ("image", "video"):
        if field in part:
            return {**part, field: names[int(part[field])]}
    return part


def _document_task(tasks: Sequence[str]) -> str:
    """What a document of several turns is called: the kind that asks most of the picture."""
    order = ("grounded_caption", "referring", "region", "ocr", "vqa", "classification", "video", "caption")
    return next((task for task in order if task in tasks), "chat")
