"""Where imports begin: annotation files with their options, keys and objects; folders with their media."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import mapping
from data_pipelines.decode.members import media_kind
from data_pipelines.errors import DataError, RecordError
from data_pipelines.samples import MediaKind
from data_pipelines.sources.item import Entries, Expected, Item, problem
from data_pipelines.sources.json_files import Line, read_objects
from data_pipelines.sources.keys import key_of

MakeItems = Callable[[str, dict[str, Any]], Iterable[Item]]


def add_files(
    parser: argparse.ArgumentParser, what: str, media_root: bool = False, name: str = "files", metavar: str = "FILE"
) -> None:
    """The positional FILE ... of a source, and `--media-root` where its objects name media."""
    parser.add_argument(name, type=Path, nargs="+", metavar=metavar, help=what)
    if media_root:
        parser.add_argument(
            "--media-root", type=Path, metavar="DIR", help="media lie under here (default: beside the file)"
        )


def each_file(paths: Sequence[Path], read_one: Callable[[Path, str], Entries]) -> Entries:
    """The entries that `read_one(path, prefix of keys)` gives of all files.

    Prefixes are the files' stems, numbered where there are several. What one file expects is told as its share of the
    bytes of all.
    """
    sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        for entry in read_one(path, key_of(path.stem) if len(paths) == 1 else f"{number}-{key_of(path.stem)}"):
            yield replace(entry, share=size / sum(sizes)) if isinstance(entry, Expected) and size else entry


def each_object(path: Path, prefix: str, what: str, make: MakeItems) -> Entries:
    """The items that `make(key, object)` gives of every object of a JSON or JSON-lines file.

    Keys are PREFIX/000000 by place in the file. An object that cannot be used (`what` it is called in its message, or
    whatever `make` refuses) is a ledger line, and so is every broken line.
    """
    for line in read_objects(path):
        if not isinstance(line, Line):
            yield line
            continue
        key = f"{prefix}/{line.number:06d}"
        try:
            yield from make(key, mapping(key, what, line.value))
        except DataError as error:
            yield problem(key, error.reason, error.message)


def media_in(folder: Path, kind: MediaKind) -> list[Path]:
    """The pictures or clips of a folder (by extension, links included), in order of their names.

    Raises:
        RecordError: it is no folder.
    """
    if not folder.is_dir():
        raise RecordError(str(folder), "missing_file", "is no folder")
    return [path for path in sorted(folder.iterdir()) if media_kind(path.name) == kind]
