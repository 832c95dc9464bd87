"""`<image>` and `<video>` tags in chat text → content parts, as ShareGPT, LLaVA and LLaMA-Factory files write them.

Tags count only where the sample lists its media beside the messages ("images", "videos"); elsewhere the same
characters are ordinary text. Each tag takes the next listed media item; where tags and media differ in number, the
users' tags alone may fit: an answer about HTML may say `<image>`. Media that neither a tag nor a part names stand first
in the first user turn; any other mismatch is an error, because the picture that a question means cannot be guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from data_pipelines.decode.fields import fail, mapping, sequence
from data_pipelines.samples import MediaKind

_TAG = re.compile(r"<(image|video)>")
_LISTS: tuple[tuple[str, MediaKind], ...] = (
    ("images", "image"),
    ("image", "image"),
    ("videos", "video"),
    ("video", "video"),
)


def expand_tags(key: str, data: dict[str, Any]) -> object:
    """`data["messages"]` with every tag replaced by a media part; unchanged where the sample lists no media.

    Raises:
        RecordError: reason "tag_mismatch", where tags and listed media differ in number.
    """
    listed = listed_media(key, data)
    if not any(listed.values()):
        return data["messages"]
    messages = [mapping(key, f"messages[{i}]", m) for i, m in enumerate(sequence(key, "messages", data["messages"]))]
    return place_media(key, messages, listed)


def listed_media(key: str, data: dict[str, Any]) -> dict[MediaKind, list[str]]:
    """The media names that the sample lists at its top level, by kind; one name may stand without a list."""
    listed: dict[MediaKind, list[str]] = {"image": [], "video": []}
    for field, kind in _LISTS:
        value = data.get(field)
        if value is None:
            continue
        for i, name in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(name, str):
                fail(key, f"{field}[{i}]", name, "needs the name of a media member", "no_media")
            listed[kind].append(name)
    return listed


def place_media(
    key: str, messages: Sequence[dict[str, Any]], listed: dict[MediaKind, list[str]]
) -> list[dict[str, Any]]:
    """Messages whose string contents are split at their tags into text and media parts, media taken in order."""
    placed, tags = _expand(messages, listed, users_only=False)
    if any(tags[kind] and tags[kind] != len(names) for kind, names in listed.items()):
        by_users, tags_of_users = _expand(messages, listed, users_only=True)
        if all(tags_of_users[kind] == len(names) for kind, names in listed.items()):
            placed, tags = by_users, tags_of_users
    for kind in ("image", "video"):
        if tags[kind] and tags[kind] != len(listed[kind]):
            expected = f"the messages hold {tags[kind]} <{kind}> tags"
            fail(key, f"{kind}s", listed[kind], expected, "tag_mismatch")
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"] if _is_media(part)]
    named = [(part["type"], part.get(part["type"])) for part in parts]
    untagged: list[dict[str, Any]] = [
        {"type": k, k: name} for k in ("image", "video") if not tags[k] for name in listed[k] if (k, name) not in named
    ]
    if untagged:
        first = next((m for m in placed if m.get("role") == "user"), None)
        if first is None:
            fail(key, "images", listed, "no tag and no user turn to put them in", "tag_mismatch")
        content = first["content"]
        first["content"] = untagged + (content if isinstance(content, list) else [{"type": "text", "text": content}])
    return placed


def _expand(
    messages: Sequence[dict[str, Any]], listed: dict[MediaKind, list[str]], users_only: bool
) -> tuple[list[dict[str, Any]], dict[MediaKind, int]]:
    """The messages with tags (on request only users') replaced while media last, and how many tags there were."""
    left = {kind: list(names) for kind, names in listed.items()}
    tags: dict[MediaKind, int] = {"image": 0, "video": 0}
    by_parts = any(_is_media(part) for m in messages if isinstance(m.get("content"), list) for part in m["content"])
    placed = []
    for message in messages:
        content = message.get("content")
        read = not users_only or message.get("role") == "user"
        if isinstance(content, str) and read:
            content = _split(content, left, tags)
        elif isinstance(content, list) and by_parts:
            content = [_named(part, left, tags) for part in content]
        elif isinstance(content, list) and read:
            content = [piece for part in content for piece in _split_part(part, left, tags)]
        placed.append({**message, "content": content})
    return placed, tags


def _split(content: str, left: dict[MediaKind, list[str]], tags: dict[MediaKind, int]) -> object:
    """Text and media parts of one string; the line break that LLaVA writes next to a tag goes with the tag."""
    pieces = _TAG.split(content)
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            words = piece[1:] if i and piece.startswith("\n") else piece
            words = words[:-1] if i + 1 < len(pieces) and words.endswith("\n") else words
            if words:
                parts.append({"type": "text", "text": words})
            continue
        kind: MediaKind = "video" if piece == "video" else "image"
        tags[kind] += 1
        if left[kind]:
            parts.append({"type": kind, kind: left[kind].pop(0)})
    return parts if len(pieces) > 1 else content


def _is_media(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "video")


def _split_part(part: object, left: dict[MediaKind, list[str]], tags: dict[MediaKind, int]) -> list[object]:
    """A text part split at its tags; its marks ("supervised") stay with each piece of text."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        return [part]
    pieces = _split(part["text"], left, tags)
    if not isinstance(pieces, list):
        return [part]
    return [{**part, "text": piece["text"]} if piece["type"] == "text" else piece for piece in pieces]


def _named(part: object, left: dict[MediaKind, list[str]], tags: dict[MediaKind, int]) -> object:
    """A media part without a name ({"type": "image"}) takes the next listed one."""
    if isinstance(part, dict):
        for kind in ("image", "video"):
            if part.get("type") == kind and part.get(kind) is None:
                tags[kind] += 1
                return {**part, kind: left[kind].pop(0)} if left[kind] else part
    return part
