"""JSON lines in this project's own record form, with media files beside them → documents.

Reads the forms of `decode.written_record`: captions with boxes and quads, messages with media by path, texts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_pipelines.decode.written_record import read_written
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.inputs import add_files, each_file, each_object
from data_pipelines.sources.item import Annotations, Entries, Item, MediaSource

HELP = "JSON or JSON lines in this project's record form, media files beside them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import records`."""
    add_files(parser, "JSON or JSON-lines files", media_root=True)


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    return each_file(options.files, lambda path, key: read_records(path, options.media_root or path.parent, key))


def read_records(path: Path, media_root: Path, prefix: str) -> Entries:
    """One item for every record of a file, keyed PREFIX/000000 by its place in the file."""
    return each_object(path, prefix, "record", lambda key, data: [record_item(key, data, media_root, path.parent)])


def record_item(key: str, data: dict[str, Any], root: Path, beside: Path | None) -> Item:
    """The document of one record object; media names are looked up under `root`, then in `beside`.

    Raises:
        DataError: whatever `parse_record` would refuse, and media that are missing or unsafe.
    """
    written = read_written(key, data)
    sources = tuple(
        MediaSource(name, kind, resolve_media(name, root, beside, key), size=written.size)
        for kind, name in written.media
    )
    return Item(key, Annotations(messages=written.messages), sources, written.task)
