"""Files that are old or new, whole, and files of JSON lines that grow by whole lines.

A file is written aside, flushed to disk and moved to its name: that costs its content once more on disk for a moment
and, flushed, a few milliseconds. Lines are added all or none, in one write. A process that is killed, or a power cut,
can leave a part of a line even so: readers leave it out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)


def write_whole(path: Path, content: bytes | str, flush: bool = True) -> None:
    """Write `content` (text as UTF-8) to `path`, whose folder is made if absent; two writers do not disturb each other.

    `flush` False leaves it to the system when it reaches the disk: after a power cut the file may be empty. On an error
    nothing is left beside the old file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
        if flush:
            flush_to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add `lines` to the file of JSON lines at `path`, which is made with its folder where there are any.

    Raises:
        OSError: there is no room for all. None is added then: a later line would run into half a one.
    """
    content = as_lines(lines).encode()
    if not content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while content:  # a disk that fills up takes a part, and refuses the rest
                content = content[file.write(content) :]
        except OSError as error:
            with suppress(OSError):
                file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in the file of lines at `path`; none where there is no file.

    What is no object is left out, with a warning unless it is a last line without its end: that may be in the making.
    """
    if not path.is_file():
        return
    damaged = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = None
            with suppress(ValueError):
                line = json.loads(text)
            if isinstance(line, dict):
                yield line
            else:
                damaged += text.endswith("\n")
    if damaged:
        _LOG.warning("%s: %d damaged line(s) left out", path, damaged)


def as_lines(lines: Iterable[Mapping[str, Any]]) -> str:
    """One line of JSON each."""
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def flush_to_disk(path: Path) -> None:
    """Force the bytes of the file, or the names in the folder, at `path` to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
