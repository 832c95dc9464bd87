"""Tool calls in chats → the agent form of the Qwen2-VL paper (section 2.2.1).

A call, its result and the reply that follows are one assistant turn: the model writes `*FUNCTION*: name *ARGS*: {...}`,
the environment inserts `*RESULT*: ...` (never learnt: the model must not predict what tools return), the model goes on
with `*RETURN*: reply` or another call. The tools are listed in the system turn.

Calls are read as turns of their own (ShareGPT's `function_call`, JSON {"name", "arguments"}) and as OpenAI writes them,
in the `tool_calls` of an assistant's message, arguments as a string of JSON. Several calls of one message stand in
their order, and so do their results, whatever the order of the "tool" messages; words beside calls, or in the turn
right before one, stand before them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from data_pipelines.decode.fields import fail, load_json, mapping, sequence
from data_pipelines.errors import RecordError

_KEYWORDS = (
    "## Continuously take action until the task is completed.\n"
    "*FUNCTION*: The action to take, should be one of {names}.\n"
    "*ARGS*: The input of the action.\n"
    "*RESULT*: Action results.\n"
    "*RETURN*: Reply based on action results."
)


def tools_prompt(key: str, tools: object) -> str:
    """The system text that lists the tools: [{"name", "description", "parameters"}], or its JSON as a string."""
    listed = load_json(key, tools.encode("utf-8", "replace"), "tools") if isinstance(tools, str) else tools
    lines = ["# Actions", "", "## You have the following actions.", ""]
    names = []
    for i, entry in enumerate(sequence(key, "tools", listed)):
        tool = mapping(key, f"tools[{i}]", entry)
        tool = mapping(key, f"tools[{i}].function", tool["function"]) if "function" in tool else tool
        name = tool.get("name")
        if not isinstance(name, str) or not name:
            fail(key, f"tools[{i}].name", name, "needs a string")
        names.append(name)
        parameters = json.dumps(tool.get("parameters", {}), ensure_ascii=False)
        lines += [f"### {name}", f"{name}: {tool.get('description') or ''} Parameters: {parameters}", ""]
    return "\n".join([*lines, _KEYWORDS.format(names=", ".join(names))])


def calls_of(key: str, field: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of an OpenAI message as turns {"role": "function_call", "content", "call"}; none: it calls nothing.

    Raises:
        RecordError: reason "bad_turns", where a call is no function with a name.
    """
    listed = entry.get("tool_calls")
    if listed is None and entry.get("function_call") is not None:
        listed = [{"function": entry["function_call"]}]  # the form before several calls were possible
    turns = []
    for i, call in enumerate(sequence(key, f"{field}.tool_calls", listed or [])):
        given = mapping(key, f"{field}.tool_calls[{i}]", call)
        function = mapping(key, f"{field}.tool_calls[{i}].function", given.get("function"))
        name = function.get("name")
        if not isinstance(name, str) or not name:
            fail(key, f"{field}.tool_calls[{i}].function.name", name, "needs a string", "bad_turns")
        content = json.dumps({"name": name, "arguments": function.get("arguments")}, ensure_ascii=False)
        turns.append({"role": "function_call", "content": content, "call": call_id(given.get("id"))})
    return turns


def call_id(value: object) -> str | None:
    """What joins a result to its call, as text."""
    return None if value is None else str(value)


def order_results(key: str, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with results that follow one another in the order of the calls whose ids they name ("call").

    Raises:
        RecordError: reason "bad_turns", where a result names a call that was not made.
    """
    made: dict[object, int] = {}
    ordered: list[dict[str, Any]] = []
    for role, run in groupby(enumerate(turns), key=lambda numbered: numbered[1]["role"]):
        group = list(run)
        if role == "observation":
            for i, turn in group:
                if turn.get("call") is not None and turn["call"] not in made:
                    fail(key, f"messages[{i}].tool_call_id", turn["call"], "no call before it has this id", "bad_turns")
            group.sort(key=lambda numbered: made.get(numbered[1].get("call"), 0))
        made.update({turn["call"]: i for i, turn in group if role == "function_call" and turn.get("call") is not None})
        ordered += [turn for _, turn in group]
    return ordered


def merge_tool_turns(key: str, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with every run of calls, results and replies joined into one assistant turn; other turns unchanged.

    Raises:
        RecordError: reason "bad_turns", where a result answers no call, or a call says no name.
    """
    merged: list[dict[str, Any]] = []
    for i, turn in enumerate(order_results(key, turns)):
        role, content = turn["role"], turn["content"]
        learnt, field = turn.get("learnt", True), turn.get("field", f"messages[{i}]")
        follows = bool(merged) and merged[-1].get("open", False)
        if role == "function_call":
            parts = _call(key, field, content, learnt)
            if follows:
                merged[-1]["content"] += parts
            elif merged and merged[-1]["role"] == "assistant":  # its words announce the call
                words = [*_parts(merged[-1]["content"], True), _text("\n", learnt)]
                merged[-1] |= {"content": words + parts, "open": True}
            else:
                merged.append({"role": "assistant", "content": parts, "open": True})
        elif role == "observation":
            if not follows:
                fail(key, field, role, "a result without a call before it", "bad_turns")
            merged[-1]["content"] += [_text("*RESULT*: ", False), *_parts(content, False), _text("\n", False)]
        elif role == "assistant" and follows:
            merged[-1]["content"] += [_text("*RETURN*: ", learnt), *_parts(content, learnt)]
            merged[-1]["open"] = False
        else:
            merged.append({"role": role, "content": content if learnt else _parts(content, learnt)})
    return [{"role": turn["role"], "content": turn["content"]} for turn in merged]


def _call(key: str, field: str, content: object, learnt: bool) -> list[dict[str, Any]]:
    """`*FUNCTION*: name *ARGS*: {...}` of a call written as JSON {"name", "arguments"}; other words are kept.

    Arguments that are themselves a string of JSON are read first: OpenAI writes them so.
    """
    if isinstance(content, list):
        return [*_parts(content, learnt), _text("\n", learnt)]
    if not isinstance(content, str):
        fail(key, field, content, "needs the call as a string", "bad_turns")
    call = _json_or_none(key, content)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return [_text(content + "\n", learnt)]
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        read = _json_or_none(key, arguments)
        arguments = read if isinstance(read, dict) else arguments
    written = json.dumps({} if arguments in (None, "") else arguments, ensure_ascii=False)
    return [_text(f"*FUNCTION*: {call['name']} *ARGS*: {written}\n", learnt)]


def _json_or_none(key: str, words: str) -> object:
    try:
        return load_json(key, words.encode("utf-8", "replace"))
    except RecordError:
        return None


def _parts(content: object, learnt: bool) -> list[dict[str, Any]]:
    parts = content if isinstance(content, list) else [_text(str(content))]
    if learnt:
        return list(parts)
    said = ("text", "region")
    return [{**p, "supervised": False} if isinstance(p, dict) and p.get("type") in said else p for p in parts]


def _text(words: str, supervised: bool = True) -> dict[str, Any]:
    return {"type": "text", "text": words} if supervised else {"type": "text", "text": words, "supervised": False}
