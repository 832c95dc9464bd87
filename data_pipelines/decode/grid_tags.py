"""Box tags inside chat text → region parts, for Qwen-VL's spelling and Qwen2-VL's.

    <ref>two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box>
    <|object_ref_start|>a bowl<|object_ref_end|><|box_start|>(2,269),(304,674)<|box_end|>

Numbers are on the 0..1000 grid; the parts are marked `"grid": True` and become pixels once the picture's size is known.
A phrase or box alone is a region, too. Among several pictures a region belongs to the latest before it, as Qwen-VL's
own tools draw it; the tokens are the same whichever it is: the grid is relative. Tags in this form that can be no place
(reversed corners, numbers over 1000, no picture beside the clips) cost the chat, because as text they would teach
Qwen-VL's old spelling. Text in which tags do not match the form stays text, and so does a chat without media.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.decode.fields import fail
from data_pipelines.samples import MediaKind

_POINT = r"\(\s*\d{1,4}\s*,\s*\d{1,4}\s*\)"
_BOX = rf"(?:<box>|<\|box_start\|>)\s*{_POINT}\s*,\s*{_POINT}\s*(?:</box>|<\|box_end\|>)"
_QUAD = rf"(?:<quad>|<\|quad_start\|>)\s*{_POINT}(?:\s*,\s*{_POINT}){{3}}\s*(?:</quad>|<\|quad_end\|>)"
_PHRASE = r"(?:<ref>|<\|object_ref_start\|>)([^<>]{1,1000}?)(?:</ref>|<\|object_ref_end\|>)"
_REGION = re.compile(rf"{_PHRASE}((?:\s*(?:{_BOX}|{_QUAD}))*)|((?:{_BOX}|{_QUAD})(?:\s*(?:{_BOX}|{_QUAD}))*)")
_PLACE = re.compile(rf"({_BOX})|({_QUAD})")
_NUMBER = re.compile(r"\d{1,4}")


def split_grid_tags(key: str, messages: Sequence[dict[str, Any]], kinds: Sequence[MediaKind]) -> list[dict[str, Any]]:
    """The messages with tagged phrases, boxes and quads as region parts; media number i of the chat is a `kinds[i]`.

    Raises:
        RecordError: reason "bad_box", where a tag can be no place in a picture.
    """
    if not kinds:
        return list(messages)
    picture = next((str(number) for number, kind in enumerate(kinds) if kind == "image"), None)
    split = []
    for message in messages:
        content = message["content"]
        parts: list[dict[str, Any]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            picture = part["image"] if part["type"] == "image" else picture
            named = {} if len(kinds) == 1 and picture is not None else {"image": picture}
            parts += _split(key, part, named) if part["type"] == "text" else [part]
        unchanged = isinstance(content, str) and len(parts) == 1 and parts[0].get("text") == content
        split.append({**message, "content": content if unchanged else parts})
    return split


def _split(key: str, part: dict[str, Any], named: dict[str, str | None]) -> list[dict[str, Any]]:
    """One text part as texts and regions; `named` says the regions' picture where there are several media."""
    words, parts, end = part["text"], list[dict[str, Any]](), 0
    for match in _REGION.finditer(words):
        region = _region(key, match)
        if region is None:
            continue
        if "image" in named and named["image"] is None:
            fail(key, "messages", match[0], "marks a place in a picture, and this chat has none", "bad_box")
        if words[end : match.start()]:
            parts.append({**part, "text": words[end : match.start()]})
        parts.append({**region, **named, **{k: v for k, v in part.items() if k == "supervised"}})
        end = match.end()
    if words[end:] or not parts:
        parts.append({**part, "text": words[end:]})
    return parts


def _region(key: str, match: re.Match[str]) -> dict[str, Any] | None:
    """The region of a match; None where the phrase is blank. Equal corners are a place thinner than a cell."""
    phrase, boxes, quads = match[1], list[list[int]](), list[list[int]]()
    if phrase is not None and not phrase.strip():
        return None
    for box, quad in _PLACE.findall(match[2] or match[3] or ""):
        numbers = [int(number) for number in _NUMBER.findall(box or quad)]
        if max(numbers) > 1000 or (box and (numbers[2] < numbers[0] or numbers[3] < numbers[1])):
            fail(key, "messages", box or quad, "needs x1 <= x2 and y1 <= y2 on the grid from 0 to 1000", "bad_box")
        (boxes if box else quads).append(numbers)
    region: dict[str, Any] = {"type": "region", "grid": True}
    if phrase is not None:
        region["phrase"] = phrase
    if boxes:
        region["boxes"] = boxes
    if quads:
        region["quads"] = quads
    return region
