"""JSON files of a run's folder, read value by value with the type that each must have.

Enters: a file as the run left it, perhaps damaged or edited since. Leaves: values of the wanted types. One of another
type is left out like a missing one and named in `faults`, so that what shows the values need not doubt them.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_train.report.figures import is_number


@dataclass(frozen=True)
class Document:
    """A JSON object; `place` is its file and the keys that lead to it. A null counts as missing."""

    place: str
    values: Mapping[str, Any]
    faults: list[str]

    def number(self, key: str) -> float | None:
        """A finite number; NaN and infinities, which Python writes into JSON, count as missing."""
        value = self.values.get(key)
        if is_number(value):
            return value
        if not isinstance(value, float):
            self._refuse(key, "no number")
        return None

    def numbers(self, key: str) -> dict[str, float]:
        """The finite numbers of an object by name."""
        inner = self.inner(key)
        return {name: float(number) for name in inner.values if (number := inner.number(name)) is not None}

    def text(self, key: str) -> str | None:
        """A text."""
        value = self.values.get(key)
        if isinstance(value, str):
            return value
        self._refuse(key, "no text")
        return None

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts of a list."""
        value = self.values.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        self._refuse(key, "no list of texts")
        return ()

    def inner(self, key: str) -> Document:
        """The object under `key`; one without values where there is none."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            self._refuse(key, "no object")
            value = {}
        return Document(f"{self.place}, {key}", value, self.faults)

    def objects(self, key: str) -> list[Document]:
        """The objects of a list; what is none in it, or is empty, is left out."""
        value = self.values.get(key)
        if not isinstance(value, list):
            self._refuse(key, "no list")
            return []
        entries = Document(
            f"{self.place}, {key}", {str(number): entry for number, entry in enumerate(value)}, self.faults
        )
        return [entry for number in entries.values if (entry := entries.inner(number)).values]

    def _refuse(self, key: str, lack: str) -> None:
        """Name a value that is there, once."""
        value = self.values.get(key)
        fault = f"{self.place}: {key} is {reprlib.repr(value)}, {lack}"
        if value is not None and fault not in self.faults:
            self.faults.append(fault)


def read_document(path: Path, faults: list[str]) -> Document:
    """The object in the file; one without values where the file is missing, or is unreadable and named."""
    value = read_json(path, faults)
    if value is not None and not isinstance(value, dict):
        faults.append(f"{path} cannot be read: it holds no JSON object")
    return Document(str(path), value if isinstance(value, dict) else {}, faults)


def read_json(path: Path, faults: list[str]) -> Any:
    """What the file holds; None where it is missing, or is unreadable and named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return None
