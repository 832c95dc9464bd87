"""Objects of a JSON array or of JSON lines, one at a time, with every broken one reported and none lost besides.

Lines end at a line feed only: U+2028 and U+0085 are ordinary characters inside strings. Blank lines are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import load_json
from data_pipelines.errors import RecordError
from data_pipelines.samples import LedgerEvent
from data_pipelines.sources.item import problem

_PEEK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Line:
    """One parsed value and its place: `number` counts from 0 over array elements, or lines of the file."""

    number: int
    value: Any


def read_objects(path: Path) -> Iterator[Line | LedgerEvent]:
    """The objects of a file: elements of a JSON array, one JSON object, or a JSON value a line.

    A file that cannot be read or a broken array is one ledger line, a broken line of JSON lines one each.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_PEEK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        yield problem(path.name, "missing_file", f"cannot be read: {error.strerror}")
        return
    if path.suffix.lower() in (".jsonl", ".ndjson") or (start.startswith(b"{") and not _is_one_object(path)):
        yield from _lines(path)
        return
    try:
        content = load_json(path.name, path.read_bytes(), max_bytes=None)
    except RecordError as error:
        yield problem(path.name, error.reason, error.message)
        return
    for number, value in enumerate(content if isinstance(content, list) else [content]):
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


def _is_one_object(path: Path) -> bool:
    """Whether a file that begins with "{" is a single object rather than JSON lines without their extension."""
    try:
        load_json(path.name, path.read_bytes(), max_bytes=None)
    except RecordError:
        with open(path, "rb") as file:
            first = file.readline()
        try:
            load_json(path.name, first)
        except RecordError:
            return True  # neither: reported as one broken file
        return False
    return True


def _lines(path: Path) -> Iterator[Line | LedgerEvent]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield Line(number, load_json(f"{path.name}:{number + 1}", line))
            except RecordError as error:
                yield problem(error.key, error.reason, error.message)
