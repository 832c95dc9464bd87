"""The short record forms → messages: a caption with boxes or quads, or a plain text.

    {"caption": "a dog and a cat", "boxes": [{"phrase": "a dog", "box": [x1, y1, x2, y2]}], "quads": [{"text", "quad"}]}
    {"caption": "a street", "boxes": [[x1, y1, x2, y2], ...], "quads": [[x1, y1, ..., x4, y4], ...]}
    {"text": "..."}

A caption becomes a question and its answer; boxes a second turn, quads a third, so that one pass over the picture
teaches all of them. "label" and "bbox" (corners, never width and height) are read as "phrase" and "box". Bare boxes or
quads say that something lies there, not what: then the places alone are asked for. All of a list are named, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from data_pipelines.decode import prompts
from data_pipelines.decode.fields import fail, known_fields, mapping, sequence, shown, text
from data_pipelines.decode.members import media_kind
from data_pipelines.decode.regions import Box, Quad, read_box, read_quad
from data_pipelines.errors import RecordError

Place = TypeVar("Place", Box, Quad)
Named = tuple[str | None, Place]

FORMS = ("caption", "text", "quads", "boxes")
_BOX_FIELDS = ("phrase", "label", "text", "box", "bbox", "bbox_xyxy", "score")
_QUAD_FIELDS = ("phrase", "text", "quad")


def expand_short_form(key: str, data: dict[str, Any], names: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The messages of a short form and the task it stands for ("text", "caption", "grounded_caption", "ocr").

    Raises:
        RecordError: where a field is missing or wrong, or the sample has not exactly one media member.
    """
    forms = [name for name in FORMS if name in data]
    if not forms:
        no_content(key, data)
    if forms[0] == "text":
        words = text(key, "text", data["text"])
        return [{"role": "assistant", "content": [{"type": "text", "text": words}]}], "text"
    name = _only_media(key, data, names)
    boxes = _read_boxes(key, data.get("boxes"))
    quads = _read_quads(key, data.get("quads"))
    turns: list[tuple[str, list[dict[str, Any]]]] = []
    task = "caption"
    if "caption" in data:
        caption = text(key, "caption", data["caption"])
        asked = prompts.video_caption(caption) if media_kind(name) == "video" else prompts.caption(caption)
        turns.append((asked, [{"type": "text", "text": caption}]))
    if boxes:
        turns.append(_box_turn(data.get("caption"), boxes))
        task = "grounded_caption"
    if quads:
        turns.append(_quad_turn(quads))
        task = task if len(turns) > 1 else "ocr"
    if not turns:
        fail(key, forms[0], data[forms[0]], "is empty and there is no caption: nothing to learn", "empty_text")
    return _turns_to_messages(name, turns), task


def no_content(key: str, data: Mapping[str, Any]) -> NoReturn:
    """Raise the error of a record in which nothing is said."""
    fields = ", ".join(shown(name) for name in data if data[name] is not None)
    has = f"has only {fields}" if fields else "is empty"
    needs = "it needs 'caption', 'text' or 'messages' (of a line of JSON also 'conversations' or 'instruction')"
    raise RecordError(key, "no_record", f"the record {has}: {needs}")


def ground(caption: str, boxes: Sequence[tuple[str, Box]]) -> tuple[str, list[dict[str, Any]]]:
    """The grounding turn of a caption: its text with boxes after each phrase, where every phrase stands in it.

    Phrases that the caption does not contain cannot be placed: then the objects are listed. For example
    ("A dog sees a cat.", [("dog", d), ("cat", c)]) gives "A ", dog d, " sees a ", cat c, ".".
    """
    grouped = _group(boxes)
    spans = []
    taken = [False] * len(caption)
    # Longer phrases first: "dog" must not take the place of "hot dog".
    for phrase in sorted(grouped, key=len, reverse=True):
        start = _find(caption, phrase, taken)
        if start < 0:
            return prompts.OBJECTS, list_objects(boxes)
        taken[start : start + len(phrase)] = [True] * len(phrase)
        spans.append((start, phrase))
    parts: list[dict[str, Any]] = []
    end = 0
    for start, phrase in sorted(spans):
        if caption[end:start]:
            parts.append({"type": "text", "text": caption[end:start]})
        end = start + len(phrase)
        parts.append({"type": "region", "phrase": caption[start:end], "boxes": [list(box) for box in grouped[phrase]]})
    if caption[end:]:
        parts.append({"type": "text", "text": caption[end:]})
    return prompts.caption(caption, grounding=True), parts


def list_objects(boxes: Sequence[tuple[str, Box]]) -> list[dict[str, Any]]:
    """One region per phrase with all its boxes, in order of appearance, separated by ", "."""
    parts: list[dict[str, Any]] = []
    for phrase, places in _group(boxes).items():
        if parts:
            parts.append({"type": "text", "text": ", "})
        parts.append({"type": "region", "phrase": phrase, "boxes": [list(box) for box in places]})
    return parts


def _box_turn(caption: str | None, boxes: Sequence[Named[Box]]) -> tuple[str, list[dict[str, Any]]]:
    named = [(phrase, box) for phrase, box in boxes if phrase is not None]
    if not named:
        return prompts.OBJECT_PLACES, [{"type": "region", "boxes": [list(box) for _, box in boxes]}]
    return (prompts.OBJECTS, list_objects(named)) if caption is None else ground(caption, named)


def _quad_turn(quads: Sequence[Named[Quad]]) -> tuple[str, list[dict[str, Any]]]:
    if quads[0][0] is None:
        return prompts.TEXT_PLACES, [{"type": "region", "quads": [list(quad) for _, quad in quads]}]
    return prompts.OCR, [{"type": "region", "phrase": words, "quads": [list(quad)]} for words, quad in quads]


def _group(boxes: Sequence[tuple[str, Box]]) -> dict[str, list[Box]]:
    grouped: dict[str, list[Box]] = {}
    for phrase, box in boxes:
        grouped.setdefault(phrase, []).append(box)
    return grouped


def _find(caption: str, phrase: str, taken: list[bool]) -> int:
    """Where `phrase` stands as whole words, in any case, on characters not yet taken; -1 where nowhere."""
    lowered, wanted = caption.lower(), phrase.lower()
    if len(lowered) != len(caption) or len(wanted) != len(phrase):
        lowered, wanted = caption, phrase  # lower-casing changed lengths (Turkish dotted I): match exactly
    start = lowered.find(wanted)
    while start >= 0:
        end = start + len(phrase)
        whole = not _joins(lowered[start - 1 : start], wanted[0]) and not _joins(lowered[end : end + 1], wanted[-1])
        if whole and not any(taken[start:end]):
            return start
        start = lowered.find(wanted, start + 1)
    return -1


def _joins(neighbour: str, edge: str) -> bool:
    # Chinese is written without spaces: there a neighbouring character does not make another word.
    return neighbour.isalnum() and edge.isalnum() and neighbour.isascii() and edge.isascii()


def _only_media(key: str, data: dict[str, Any], names: Sequence[str]) -> str:
    for field in ("image", "video"):
        if data.get(field) is not None:
            if data[field] not in names:
                fail(key, field, data[field], "no media member of this sample", "no_media")
            return str(data[field])
    if len(names) != 1:
        fail(key, "media", list(names), "a caption needs exactly one media member", "no_media")
    return names[0]


def _read_boxes(key: str, value: object) -> list[Named[Box]]:
    boxes: list[Named[Box]] = []
    for i, entry in enumerate(sequence(key, "boxes", value if value is not None else [])):
        if isinstance(entry, list):
            boxes.append((None, read_box(key, f"boxes[{i}]", entry)))
            continue
        fields = mapping(key, f"boxes[{i}]", entry)
        known_fields(key, f"boxes[{i}]", fields, _BOX_FIELDS)
        phrase, phrase_field = _first(fields, ("phrase", "label", "text"))
        box, box_field = _first(fields, ("box", "bbox", "bbox_xyxy"))
        words = text(key, f"boxes[{i}].{phrase_field}", phrase)
        boxes.append((words, read_box(key, f"boxes[{i}].{box_field}", box)))
    return _all_or_none_named(key, "boxes", boxes)


def _read_quads(key: str, value: object) -> list[Named[Quad]]:
    quads: list[Named[Quad]] = []
    for i, entry in enumerate(sequence(key, "quads", value if value is not None else [])):
        if isinstance(entry, list):
            quads.append((None, read_quad(key, f"quads[{i}]", entry)))
            continue
        fields = mapping(key, f"quads[{i}]", entry)
        known_fields(key, f"quads[{i}]", fields, _QUAD_FIELDS)
        words, field = _first(fields, ("phrase", "text"))
        quad = read_quad(key, f"quads[{i}].quad", fields.get("quad"))
        quads.append((text(key, f"quads[{i}].{field}", words), quad))
    return _all_or_none_named(key, "quads", quads)


def _all_or_none_named(key: str, field: str, places: list[Named[Place]]) -> list[Named[Place]]:
    """The places, if all have a phrase or none has: an answer that names some things only would be wrong."""
    bare = [i for i, (phrase, _) in enumerate(places) if phrase is None]
    if bare and len(bare) < len(places):
        fail(key, f"{field}[{bare[0]}]", list(places[bare[0]][1]), "has no phrase, others have: name all or none")
    return places


def _first(fields: dict[str, Any], names: Sequence[str]) -> tuple[Any, str]:
    """The first of several spellings that is present, with its name; (None, the first name) where none is."""
    return next(((fields[name], name) for name in names if name in fields), (None, names[0]))


def _turns_to_messages(name: str, turns: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    kind = media_kind(name) or "image"
    messages: list[dict[str, Any]] = []
    for asked, answer in turns:
        question: list[dict[str, Any]] = [] if messages else [{"type": kind, kind: name}]
        messages.append({"role": "user", "content": [*question, {"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": answer})
    return messages
