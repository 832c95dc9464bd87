"""Memory-mapped columns in one file: how an index lies on disk and is read without private memory.

The container is safetensors' (8 bytes of header length, a JSON header, raw little-endian arrays), so any safetensors
reader opens an index and nothing in it can run code. Enters: named numpy arrays and a JSON-able description. Leaves:
numpy views of the mapped file: opening costs about 0.2 ms whatever the number of rows, and forked or spawned workers
share the pages. A file that is cut or of another format is refused, never half read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from data_pipelines.whole import write_whole

Array = npt.NDArray[Any]

_DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
_MAX_HEADER = 1 << 28


class ColumnError(ValueError):
    """A side file that cannot be used: cut, foreign, or of another format. It is built anew, never repaired."""


class Columns:
    """Named arrays of one mapped file (`arrays`) and its description (`meta`)."""

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ColumnError(f"{path}: {error.strerror}") from error
        if size < 10:
            raise ColumnError(f"{path}: {size} bytes")
        try:
            # Unlike Python's `mmap` this keeps no descriptor, of which a process has 1,024 as a rule.
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise ColumnError(f"{path}: {error}") from error
        data = mapped.numpy()
        data.flags.writeable = False
        self.path = path
        self.arrays, self.meta = _parse(path, data.data)

    def text(self, name: str, row: int) -> str:
        """Row `row` of the string column `name` (arrays `name`_bytes and `name`_ends)."""
        ends = self.arrays[f"{name}_ends"]
        start = int(ends[row - 1]) if row else 0
        return bytes(self.arrays[f"{name}_bytes"][start : int(ends[row])]).decode("utf-8")


def _parse(path: Path, data: memoryview) -> tuple[dict[str, Array], dict[str, Any]]:
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER, len(data) - 8):
        raise ColumnError(f"{path}: header of {length} bytes in a file of {len(data)}")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        meta = json.loads(header.pop("__metadata__")["index"])
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            (rows,) = entry["shape"]
            if end - begin != rows * dtype.itemsize or 8 + length + end > len(data):
                raise ColumnError(f"{path}: column {name} lies outside the file")
            arrays[name] = np.frombuffer(data, dtype, rows, 8 + length + begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ColumnError(f"{path}: not an index ({error})") from error
    return arrays, meta


def text_column(name: str, rows: list[str]) -> dict[str, Array]:
    """A string column as two arrays: the UTF-8 bytes end to end, and where each row ends."""
    encoded = [row.encode("utf-8", "backslashreplace") for row in rows]
    return {
        f"{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}_ends": np.cumsum([len(row) for row in encoded], dtype=np.uint64),
    }


def write_columns(path: Path, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> None:
    """Write `path` so that a reader sees the whole file or the one before; two writers do not disturb each other."""
    # safetensors sorts by alignment, so every array begins at a multiple of its item size.
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"index": json.dumps(meta)})
    write_whole(path, data)
