"""Typed reading of untrusted JSON values: each function returns a checked value or raises `RecordError`.

Every error names the sample's key, the field's path ("messages[1].content[0].image") and the value, shortened and in
ASCII, so that it can be logged anywhere. Nothing is converted silently: "10" is no number, true is no 1.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from data_pipelines.config import MAX_RECORD_BYTES
from data_pipelines.errors import RecordError

MAX_COORDINATE = 1_000_000.0
MAX_SIDE = 1_000_000


def fail(key: str, field: str, value: object, expected: str, reason: str = "bad_field") -> NoReturn:
    """Raise the error of one field; `expected` says what would have been right."""
    raise RecordError(key, reason, f"{field} = {shown(value)}: {expected}")


def shown(value: object) -> str:
    """A value for a message: at most about 80 ASCII characters, whatever its depth, size or encoding."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    short.maxlist = short.maxdict = short.maxtuple = 4
    short.maxlevel = 3
    text = short.repr(value).encode("ascii", "backslashreplace").decode("ascii")
    return text if len(text) <= 100 else text[:97] + "..."


def load_json(key: str, data: bytes, field: str = "json", max_bytes: int | None = MAX_RECORD_BYTES) -> Any:
    """Parse UTF-8 JSON (a byte order mark is allowed). NaN, Infinity and excessive nesting are errors.

    Raises:
        RecordError: reason "bad_json"; a second encoding is never guessed, because a wrong guess trains on noise.
    """
    if max_bytes is not None and len(data) > max_bytes:
        fail(key, field, f"{len(data)} bytes", f"at most {max_bytes} bytes", "bad_json")
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        fail(
            key, field, data[max(0, error.start - 8) : error.start + 8], f"not UTF-8 at byte {error.start}", "bad_json"
        )
    except RecursionError:
        fail(key, field, data[:16], "nested too deeply", "bad_json")
    except ValueError as error:
        fail(key, field, data[:40], f"not JSON ({error})", "bad_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def mapping(key: str, field: str, value: object) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        fail(key, field, value, "needs an object {...}")
    return cast(dict[str, Any], value)


def sequence(key: str, field: str, value: object) -> list[Any]:
    """A JSON array."""
    if not isinstance(value, list):
        fail(key, field, value, "needs a list [...]")
    return value


def text(key: str, field: str, value: object, empty: bool = False) -> str:
    """A string that encodes as UTF-8 (no lone surrogates). Blank strings are errors unless `empty` allows them."""
    if not isinstance(value, str):
        fail(key, field, value, "needs a string", "bad_text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fail(key, field, value, f"no valid Unicode: lone surrogate at character {error.start}", "bad_text")
    if not empty and not value.strip():
        fail(key, field, value, "is blank", "empty_text")
    return value


def flag(key: str, field: str, value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        fail(key, field, value, "needs true or false")
    return value


def number(key: str, field: str, value: object, low: float, high: float, reason: str = "bad_field") -> float:
    """A finite number in [low, high]; booleans and strings are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(key, field, value, "needs a number", reason)
    # Integers of any length compare exactly; converting first would overflow.
    if not low <= value <= high:
        fail(key, field, value, f"needs a number between {low:g} and {high:g}", reason)
    return float(value)


def integer(key: str, field: str, value: object, low: int, high: int) -> int:
    """An integer in [low, high]; 3.0 counts as 3."""
    value = number(key, field, value, low, high)
    if not math.isfinite(value) or value != int(value):
        fail(key, field, value, "needs a whole number")
    return int(value)


def coordinates(key: str, field: str, value: object, count: int) -> tuple[float, ...]:
    """Exactly `count` finite pixel coordinates."""
    values = value if isinstance(value, list) else fail(key, field, value, f"needs {count} numbers", "bad_box")
    if len(values) != count:
        fail(key, field, value, f"needs {count} numbers, has {len(values)}", "bad_box")
    return tuple(number(key, field, entry, -MAX_COORDINATE, MAX_COORDINATE, "bad_box") for entry in values)


def known_fields(key: str, field: str, value: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse a field that nobody reads: it is a misspelt one."""
    for name in value:
        if name not in known:
            fail(key, f"{field}.{shown(name)[1:-1]}", value[name], f"unknown field; known: {', '.join(known)}")
