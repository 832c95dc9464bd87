"""Tool calls in chats → the agent form of the Qwen2-VL paper (section 2.2.1).

A call, its result and the reply that follows are one assistant turn: the model writes `*FUNCTION*: name *ARGS*: {...}`,
the environment inserts `*RESULT*: ...` (never learnt: the model must not predict what tools return), the model goes on
with `*RETURN*: reply` or another call. The tools are listed in the system turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def merge_tool_turns(key: str, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns with every run of calls, results and replies joined into one assistant turn; other turns unchanged.

    Raises:
        RecordError: reason "bad_turns", where a result answers no call, or a call says no name.
    """
    merged: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        role, content = turn["role"], turn["content"]
        follows = bool(merged) and merged[-1].get("open", False)
        if role == "function_call":
            parts = [_text(_call(key, f"messages[{i}]", content) + "\n")]
            if follows:
                merged[-1]["content"] += parts
            else:
                merged.append({"role": "assistant", "content": parts, "open": True})
        elif role == "observation":
            if not follows:
                fail(key, f"messages[{i}]", role, "a result without a call before it", "bad_turns")
            merged[-1]["content"] += [_text("*RESULT*: ", False), *_result(content), _text("\n", False)]
        elif role == "assistant" and follows:
            merged[-1]["content"] += [_text("*RETURN*: "), *_parts(content)]
            merged[-1]["open"] = False
        else:
            merged.append({"role": role, "content": content})
    return [{"role": turn["role"], "content": turn["content"]} for turn in merged]


def _call(key: str, field: str, content: object) -> str:
    """`*FUNCTION*: name *ARGS*: {...}` of a call written as JSON {"name", "arguments"}; other text is kept as it is."""
    if not isinstance(content, str):
        fail(key, field, content, "needs the call as a string", "bad_turns")
    try:
        call = load_json(key, content.encode("utf-8", "replace"))
    except RecordError:
        return content
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return content
    return f"*FUNCTION*: {call['name']} *ARGS*: {json.dumps(call.get('arguments', {}), ensure_ascii=False)}"


def _result(content: object) -> list[dict[str, Any]]:
    return [{**part, "supervised": False} if part.get("type") == "text" else part for part in _parts(content)]


def _parts(content: object) -> list[dict[str, Any]]:
    return list(content) if isinstance(content, list) else [_text(str(content))]


def _text(words: str, supervised: bool = True) -> dict[str, Any]:
    return {"type": "text", "text": words} if supervised else {"type": "text", "text": words, "supervised": False}
