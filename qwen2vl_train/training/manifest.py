"""Whether a checkpoint's files are those that were written: sizes and checksums against its `manifest.json`.

Enters: a folder. Leaves: a fault in words, or None. Costs reading it once, divided by the number of ranks.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any


def fault_of(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with the checkpoint at `path`: a missing, short or altered file. None when it is whole.

    The content of every `world`-th file is read, the sizes of all.
    """
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return f"{manifest} is missing: not a finished checkpoint"
    try:
        entries = sorted((str(name), int(size), int(crc)) for name, (size, crc) in _read(manifest).items())
        for number, (name, size, wanted) in enumerate(entries):
            file = path / name
            if not file.is_file() or file.stat().st_size != size:
                return f"{file} is missing or not {size} bytes"
            if number % world == rank and checksum(file) != wanted:
                return f"{file} has another checksum than when it was written"
    except (OSError, ValueError, TypeError) as error:
        return f"{path} cannot be read ({error})"
    return None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError where there is none."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def checksum(path: Path) -> int:
    """CRC-32 of the file at `path`."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
