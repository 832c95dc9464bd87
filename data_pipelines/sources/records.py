"""JSON lines in this project's own record form, with media files beside them → documents.

    {"image": "a.jpg", "caption": "a dog", "boxes": [{"phrase": "a dog", "box": [x1, y1, x2, y2]}], "quads": [...]}
    {"messages": [{"role": "user", "content": "<image>What?"}, ...], "images": ["a.jpg"], "videos": [...]}
    {"text": "..."}

Boxes are corners in pixels ("label" and "bbox" are read as "phrase" and "box"). A sample with a wrong box is refused as
a whole: who writes this form for training means every box. "width" and "height", where given, must be the picture's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import mapping, text
from data_pipelines.decode.members import media_kind
from data_pipelines.decode.short_form import expand_short_form
from data_pipelines.errors import DataError
from data_pipelines.samples import MediaKind
from data_pipelines.sources.chat import chat_item
from data_pipelines.sources.coco import declared_size
from data_pipelines.sources.item import Annotations, Entries, Item, MediaSource, problem
from data_pipelines.sources.json_files import Line, read_objects
from data_pipelines.sources.keys import key_of
from data_pipelines.sources.pictures import resolve_media

HELP = "JSON or JSON lines in this project's record form, media files beside them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import records`."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON or JSON-lines files")
    parser.add_argument(
        "--media-root", type=Path, metavar="DIR", help="media lie under here (default: beside the file)"
    )


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    for number, path in enumerate(options.files):
        prefix = key_of(path.stem) if len(options.files) == 1 else f"{number}-{key_of(path.stem)}"
        yield from read_records(path, options.media_root or path.parent, prefix)


def read_records(path: Path, media_root: Path, prefix: str) -> Entries:
    """One item for every record of a file, keyed PREFIX/000000 by its place in the file."""
    for line in read_objects(path):
        if not isinstance(line, Line):
            yield line
            continue
        key = f"{prefix}/{line.number:06d}"
        try:
            yield record_item(key, mapping(key, "record", line.value), media_root, path.parent)
        except DataError as error:
            yield problem(key, error.reason, error.message)


def record_item(key: str, data: dict[str, Any], root: Path, beside: Path | None) -> Item:
    """The document of one record object.

    Raises:
        DataError: whatever `parse_record` would refuse, and media that are missing or unsafe.
    """
    if "messages" in data or "conversations" in data or "instruction" in data:
        return chat_item(key, data, root, beside, str(data.get("task") or "chat"))
    named = next((data[field] for field in ("image", "video") if data.get(field) is not None), None)
    if "caption" not in data and named is None:
        message = {"role": "assistant", "content": text(key, "text", data.get("text"))}
        return Item(key, Annotations(messages=(message,)), (), "text")
    path = resolve_media(named, root, beside, key)
    kind: MediaKind = "video" if data.get("video") is not None else (media_kind(path.name) or "image")
    member = f"0.{'mp4' if kind == 'video' else 'jpg'}"
    messages, task = expand_short_form(key, {**data, "image": None, "video": None}, [member])
    for part in messages[0]["content"]:
        if part["type"] == kind:
            part[kind] = "0"
    media = MediaSource(path.name, kind, path, size=declared_size(data))
    return Item(key, Annotations(messages=tuple(messages)), (media,), str(data.get("task") or task))
