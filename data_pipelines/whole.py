"""A file that is either the old one or the new one, whole: written aside, flushed to disk, moved to its name.

Enters: a path and its whole content. Costs the content once more on disk for a moment and, flushed, a few milliseconds.
"""

from __future__ import annotations

import os
from pathlib import Path


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


def flush_to_disk(path: Path) -> None:
    """Force the bytes of the file, or the names in the folder, at `path` to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
