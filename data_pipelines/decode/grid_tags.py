"""Box tags inside chat text → region parts, for Qwen-VL's spelling and Qwen2-VL's.

    <ref>two apples</ref><box>(302,257),(582,671)</box><box>(603,252),(878,642)</box>
    <|object_ref_start|>a bowl<|object_ref_end|><|box_start|>(2,269),(304,674)<|box_end|>

Numbers are on the 0..1000 grid; the parts are marked `"grid": True` and become pixels once the picture's size is known.
A phrase or box alone is a region, too. Text in which tags do not match this form stays text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_POINT = r"\(\s*\d{1,4}\s*,\s*\d{1,4}\s*\)"
_BOX = rf"(?:<box>|<\|box_start\|>)\s*{_POINT}\s*,\s*{_POINT}\s*(?:</box>|<\|box_end\|>)"
_QUAD = rf"(?:<quad>|<\|quad_start\|>)\s*{_POINT}(?:\s*,\s*{_POINT}){{3}}\s*(?:</quad>|<\|quad_end\|>)"
_PHRASE = r"(?:<ref>|<\|object_ref_start\|>)([^<>]{1,1000}?)(?:</ref>|<\|object_ref_end\|>)"
_REGION = re.compile(rf"{_PHRASE}((?:\s*(?:{_BOX}|{_QUAD}))*)|((?:{_BOX}|{_QUAD})(?:\s*(?:{_BOX}|{_QUAD}))*)")
_PLACE = re.compile(rf"({_BOX})|({_QUAD})")
_NUMBER = re.compile(r"\d{1,4}")


def split_grid_tags(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with tagged phrases, boxes and quads as region parts; the chat has one picture."""
    split = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            parts = _parts(content, {})
            content = content if len(parts) == 1 and parts[0].get("text") == content else parts
        else:
            content = [
                piece
                for part in content
                for piece in (
                    _parts(part["text"], {k: v for k, v in part.items() if k == "supervised"})
                    if part["type"] == "text"
                    else [part]
                )
            ]
        split.append({**message, "content": content})
    return split


def _parts(words: str, marks: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    end = 0
    for match in _REGION.finditer(words):
        region = _region(match)
        if region is None:
            continue
        if words[end : match.start()]:
            parts.append({"type": "text", "text": words[end : match.start()], **marks})
        parts.append({**region, **marks})
        end = match.end()
    if words[end:] or not parts:
        parts.append({"type": "text", "text": words[end:], **marks})
    return parts


def _region(match: re.Match[str]) -> dict[str, Any] | None:
    """The region of a match; None where a number is over 1000 or a box has no area, which is no grid box."""
    phrase, boxes, quads = match[1], list[list[int]](), list[list[int]]()
    for box, quad in _PLACE.findall(match[2] or match[3] or ""):
        numbers = [int(number) for number in _NUMBER.findall(box or quad)]
        if max(numbers) > 1000 or (box and (numbers[2] <= numbers[0] or numbers[3] <= numbers[1])):
            return None
        (boxes if box else quads).append(numbers)
    if phrase is not None and not phrase.strip():
        return None
    region: dict[str, Any] = {"type": "region", "grid": True}
    if phrase is not None:
        region["phrase"] = phrase
    if boxes:
        region["boxes"] = boxes
    if quads:
        region["quads"] = quads
    return region
