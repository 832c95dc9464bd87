"""Chats as others write them → turns in record form: ShareGPT, LLaVA, LLaMA-Factory, OpenAI-style messages, alpaca.

Read forms, one object each:

    {"conversations": [{"from": "human" | "gpt" | "system" | "function_call" | "observation", "value": "..."}],
     "image": "a.jpg" | "images": [...], "videos": [...], "system": "...", "tools": "[...]"}
    {"messages": [{"role": "user", "content": "<image>..." | [{"type": "text", "text": ...}, {"type": "image", ...}]},
                  {"role": "assistant", "content": null, "tool_calls": [{"id", "function": {"name", "arguments"}}]},
                  {"role": "tool", "tool_call_id": ..., "content": ...}], "tools": [...]}
    {"instruction": "...", "input": "...", "output": "...", "history": [["q", "a"], ...], "system": "..."}

Tool calls become the paper's agent form inside one assistant turn: `*FUNCTION*`, `*ARGS*`, an unsupervised `*RESULT*`,
`*RETURN*`. An answer of `"loss_weight": 0` (OpenAI's `"weight": 0`) is not learnt. Qwen-VL's
`<ref>..</ref><box>(x1,y1),(x2,y2)</box>` and Qwen2-VL's own tags become regions (see `grid_tags`).
Pictures and clips are numbered in order of their first use; no file is opened here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipelines.decode.agent import call_id, calls_of, merge_tool_turns, tools_prompt
from data_pipelines.decode.fields import fail, mapping, sequence, text
from data_pipelines.decode.grid_tags import split_grid_tags
from data_pipelines.decode.tags import listed_media, place_media
from data_pipelines.samples import MediaKind

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "observation",
    "tool": "observation",
    "function": "observation",
}
_MEDIA_TYPES: dict[str, MediaKind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


def read_chat(key: str, data: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[MediaKind, str]]]:
    """The turns of a chat object, whose media parts name a medium by number ("0", ...), and the media by that number.

    A medium is (kind, name as written). Regions on the 0..1000 grid are marked `"grid": True`.

    Raises:
        RecordError: unknown form, unknown role, media that do not match their tags.
    """
    messages = read_turns(key, data)
    if data.get("audios") or any("<audio>" in str(message["content"]) for message in messages):
        said = "sound is not read: what is asked about it cannot be learnt"
        fail(key, "messages", "<audio>", said, "unsupported_media")
    listed = listed_media(key, data)
    messages = [named_parts(key, i, message) for i, message in enumerate(messages)]
    if any(listed.values()) or _has_unnamed(messages):
        messages = place_media(key, messages, listed)
    numbers: dict[tuple[MediaKind, str], int] = {}
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            kind: MediaKind | None = _MEDIA_TYPES.get(part["type"])
            if kind is not None:
                part[kind] = str(numbers.setdefault((kind, part[kind]), len(numbers)))
    _number_regions(key, messages, numbers)
    media = list(numbers)
    return trim(split_grid_tags(key, messages, [kind for kind, _ in media])), media


def _number_regions(key: str, messages: Sequence[dict[str, Any]], numbers: dict[tuple[MediaKind, str], int]) -> None:
    """Regions name their picture as its media part does; they get its number, too."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "region" and "image" in part:
                named = next((number for (_, name), number in numbers.items() if name == part["image"]), None)
                if named is None:
                    fail(key, "region.image", part["image"], "names no picture of this chat", "no_media")
                part["image"] = str(named)


def read_turns(key: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Turns [{"role", "content"}] with roles system, user, assistant, of any of the read forms."""
    if "conversations" in data or "messages" in data:
        field = "messages" if "messages" in data else "conversations"
        entries = enumerate(sequence(key, field, data[field]))
        turns = [turn for i, entry in entries for turn in _turns(key, f"{field}[{i}]", entry)]
    elif "instruction" in data or "output" in data:
        turns = _alpaca(key, data)
    else:
        fail(key, "chat", sorted(data), 'needs "messages", "conversations" or "instruction"', "no_record")
    system = [text(key, "system", data["system"])] if data.get("system") else []
    if data.get("tools") and data["tools"] != "[]":
        system.append(tools_prompt(key, data["tools"]))
    if system:
        if turns and turns[0]["role"] == "system":
            system.insert(0, text(key, "system", turns.pop(0)["content"]))
        turns.insert(0, {"role": "system", "content": "\n\n".join(system)})
    return merge_tool_turns(key, turns)


def trim(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without answers before the first question and questions after the last answer: neither can be learnt from."""
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while len(kept) > first + 1 and kept[first]["role"] == "assistant" and kept[first + 1]["role"] == "user":
        del kept[first]
    while len(kept) > 1 and kept[-1]["role"] == "user" and kept[-2]["role"] == "assistant":
        del kept[-1]
    return kept


def _turns(key: str, field: str, value: object) -> list[dict[str, Any]]:
    """The turn of one entry; or those of its tool calls, after the words beside them."""
    entry = mapping(key, field, value)
    role_field, content_field = ("from", "value") if "from" in entry else ("role", "content")
    name = entry.get(role_field)
    if not isinstance(name, str) or name not in _ROLES:
        fail(key, f"{field}.{role_field}", name, f"needs one of {', '.join(sorted(_ROLES))}", "bad_turns")
    content, role = entry.get(content_field), _ROLES[name]
    calls = calls_of(key, field, entry) if role == "assistant" else []
    if calls:
        turns = ([{"role": "function_call", "content": content}] if content else []) + calls
    else:
        turns = [{"role": role, "content": content, "call": call_id(entry.get("tool_call_id"))}]
    if not (calls and content is None) and not isinstance(content, str | list):
        fail(key, f"{field}.{content_field}", content, "needs a string or a list of parts", "bad_text")
    muted = entry.get("loss_weight", entry.get("weight")) == 0 and role in ("assistant", "function_call")
    return [{**turn, "field": field, "learnt": not muted} for turn in turns]


def _alpaca(key: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for i, pair in enumerate(sequence(key, "history", data.get("history") or [])):
        asked, answered, *_ = [*sequence(key, f"history[{i}]", pair), None, None]
        turns.append({"role": "user", "content": text(key, f"history[{i}][0]", asked)})
        turns.append({"role": "assistant", "content": text(key, f"history[{i}][1]", answered)})
    asked = text(key, "instruction", data.get("instruction"), empty=True)
    given = text(key, "input", data.get("input") or "", empty=True)
    question = "\n".join(part for part in (asked, given) if part.strip())
    turns.append({"role": "user", "content": text(key, "instruction", question)})
    turns.append({"role": "assistant", "content": text(key, "output", data.get("output"))})
    return turns


def named_parts(key: str, i: int, message: dict[str, Any]) -> dict[str, Any]:
    """Turn `i` with a list content as parts of the record form: OpenAI's image_url and texts under "value" are respelt.

    Fields that the record form does not know are left out.

    Raises:
        RecordError: a part of an unknown type, a text that is none, a medium whose name is no string.
    """
    if not isinstance(message["content"], list):
        return message
    parts = []
    for j, entry in enumerate(message["content"]):
        field = f"messages[{i}].content[{j}]"
        part = mapping(key, field, entry)
        kind = part.get("type")
        if kind == "text":
            words = part.get("text", part.get("value"))
            known = {"type": "text", "text": text(key, f"{field}.text", words, empty=True)}
            parts.append({**known, **({"supervised": part["supervised"]} if "supervised" in part else {})})
        elif kind == "region":
            parts.append(dict(part))
        elif isinstance(kind, str) and kind in _MEDIA_TYPES:
            parts.append(_media_part(key, field, _MEDIA_TYPES[kind], part))
        else:
            fail(key, f"{field}.type", kind, f"needs text or one of {', '.join(_MEDIA_TYPES)}")
    return {**message, "content": parts}


def _media_part(key: str, field: str, kind: MediaKind, part: dict[str, Any]) -> dict[str, Any]:
    name = next((part[spelt] for spelt in (part["type"], kind, "url", "path") if part.get(spelt) is not None), None)
    name = name.get("url") if isinstance(name, dict) else name
    if name is not None and not isinstance(name, str):
        fail(key, f"{field}.{kind}", name, "needs a relative path", "missing_media")
    limits: dict[str, Any] = {
        option: part[option] for option in ("min_pixels", "max_pixels", "fps", "nframes") if option in part
    }
    return {"type": kind, **({} if name is None else {kind: name}), **limits}


def _has_unnamed(messages: Sequence[dict[str, Any]]) -> bool:
    return any(
        part["type"] in ("image", "video") and part["type"] not in part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )
