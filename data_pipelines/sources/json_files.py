"""Objects of a JSON array or of JSON lines, one at a time, with every broken one reported and none lost besides.

Lines end at a line feed only: U+2028 and U+0085 are ordinary characters inside strings. Blank lines are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipelines.config import MAX_RECORD_BYTES
from data_pipelines.decode.fields import load_json
from data_pipelines.errors import RecordError
from data_pipelines.samples import LedgerEvent
from data_pipelines.sources.item import Expected, problem

_PEEK_BYTES = 4096
_PEEK_LINES = 100  # a broken line at the beginning does not hide the others


@dataclass(frozen=True, slots=True)
class Line:
    """One parsed value and its place: `number` counts from 0 over array elements, or lines of the file."""

    number: int
    value: Any


def read_objects(path: Path) -> Iterator[Line | LedgerEvent | Expected]:
    """The objects of a file: elements of a JSON array, one JSON object, or a JSON value a line.

    A file that cannot be read or a broken array is one ledger line, a broken line of JSON lines one each.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_PEEK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        yield problem(path.name, "missing_file", f"cannot be read: {error.strerror}")
        return
    if path.suffix.lower() in (".jsonl", ".ndjson") or (not start.startswith(b"[") and _holds_lines(path)):
        yield from _lines(path)
        return
    try:
        content = load_json(path.name, path.read_bytes(), max_bytes=None)
    except RecordError as error:
        yield problem(path.name, error.reason, error.message)
        return
    values = content if isinstance(content, list) else [content]
    yield Expected(len(values))
    for number, value in enumerate(values):
        yield Line(number, value)


def read_json(path: Path) -> Any:
    """The whole of an annotation file.

    Raises:
        RecordError: reason "missing_file" or "bad_json".
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(str(path), "missing_file", f"cannot be read: {error.strerror}") from error
    return load_json(str(path), data, max_bytes=None)


def _holds_lines(path: Path) -> bool:
    """Whether a file without an array is JSON lines without their extension: not JSON as a whole, but a line of it is.

    A line counts that is an object from its first column on; those of a broken file in one piece are indented.
    """
    if _is_json(path.read_bytes(), None):
        return False
    with open(path, "rb") as file:
        return any(line.startswith(b"{") and _is_json(line) for line in islice(file, _PEEK_LINES))


def _is_json(data: bytes, max_bytes: int | None = MAX_RECORD_BYTES) -> bool:
    try:
        load_json("", data, max_bytes=max_bytes)
    except RecordError:
        return False
    return True


def _lines(path: Path) -> Iterator[Line | LedgerEvent | Expected]:
    with open(path, "rb") as file:
        # Counting line feeds costs a second for some gigabytes, and nothing beside the media that the lines name.
        yield Expected(sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")))
        file.seek(0)
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield Line(number, load_json(f"{path.name}:{number + 1}", line))
            except RecordError as error:
                yield problem(error.key, error.reason, error.message)
