"""A folder of clips with captions → documents.

Captions come from a table (CSV or TSV with a header: a column video, file or path, and caption or text; WebVid's
videoid, page_dir and name; or JSON: a list of such objects, or {file: caption}), or from NAME.txt beside NAME.mp4.
Columns question and answer, "captions" (a list) and chats ("messages", "conversations") are read too. Clips of the
folder that the table does not name are ledger lines.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.config import MAX_RECORD_BYTES
from data_pipelines.decode.fields import fail, mapping, sequence, text
from data_pipelines.decode.members import media_kind
from data_pipelines.errors import DataError, MediaError, RecordError
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.chat import chat_item
from data_pipelines.sources.inputs import media_in
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, MediaSource, Question, problem
from data_pipelines.sources.json_files import Line, read_json, read_objects
from data_pipelines.sources.keys import key_of

HELP = "a folder of clips with captions (CSV, JSON, or a text file beside each clip)"

_Row = dict[str, Any] | LedgerEvent | Expected
_FILE_COLUMNS = ("video", "file", "path", "file_name", "filename", "videoid", "video_path")
_CAPTION_COLUMNS = ("caption", "text", "description", "name")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import clips`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the clips")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="CSV or JSON (default: NAME.txt beside NAME.mp4)")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_clips(options.folder, options.captions)


def read_clips(folder: Path, captions: Path | None) -> Entries:
    """One item a clip, in order of the table, or of names without one; every clip is an item or a ledger line."""
    clips = media_in(folder, "video")
    rows = _beside(clips) if captions is None else _table(captions)
    told: set[Path] = set()
    for number, row in rows:
        if isinstance(row, LedgerEvent | Expected):
            yield row
            continue
        key = f"{number:06d}"
        try:
            path = _clip(key, row, folder)
            key = f"{number:06d}-{key_of(path.stem)}"
            told.add(path)
            yield clip_item(key, row, path, folder)
        except DataError as error:
            yield problem(key, error.reason, error.message)
    for path in sorted(folder.rglob("*")) if captions is not None else ():
        if media_kind(path.name) == "video" and path.resolve() not in told:
            yield problem(path.name, "no_annotation", "the clip is named in no caption")


def clip_item(key: str, row: dict[str, Any], path: Path, folder: Path) -> Item:
    """The document of one row: its captions, its question and answer, or its chat."""
    if "messages" in row or "conversations" in row:
        chat = {name: value for name, value in row.items() if name not in _FILE_COLUMNS}
        chat["videos"] = [str(path.relative_to(folder.resolve()))]
        return chat_item(key, chat, folder, None, "video")
    listed = row.get("captions")
    if listed is None:
        listed = [row[column] for column in _CAPTION_COLUMNS if row.get(column) is not None][:1]
    told = [text(key, f"captions[{i}]", caption) for i, caption in enumerate(sequence(key, "captions", listed))]
    questions: tuple[Question, ...] = ()
    if row.get("question") is not None:
        questions = (Question(text(key, "question", row["question"]), text(key, "answer", row.get("answer"))),)
    if not told and not questions:
        fail(key, "row", sorted(row), "has neither caption nor question", "no_annotation")
    annotations = Annotations(captions=tuple(told), questions=questions)
    return Item(key, annotations, (MediaSource(path.name, "video", path),), "video")


def _clip(key: str, row: dict[str, Any], folder: Path) -> Path:
    """The file that a row names; WebVid's videoid 17 is 17.mp4, or 17.mp4 in the folder `page_dir`."""
    column = next((column for column in _FILE_COLUMNS if row.get(column)), None)
    named = None if column is None else row[column]
    if column == "videoid":
        for name in (f"{named}", f"{named}.mp4", f"{row.get('page_dir')}/{named}.mp4"):
            try:
                return resolve_media(name, folder, None, key)
            except MediaError as error:
                if error.reason != "missing_media":
                    raise
    return resolve_media(named, folder, None, key)


def _beside(clips: Sequence[Path]) -> Iterator[tuple[int, _Row]]:
    yield 0, Expected(len(clips))
    for number, path in enumerate(clips):
        try:
            caption = path.with_suffix(".txt").read_bytes().decode("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield number, problem(path.name, "no_annotation", f"no readable {path.stem}.txt beside it: {error}")
            continue
        yield number, {"video": path.name, "caption": caption}


def _table(path: Path) -> Iterator[tuple[int, _Row]]:
    if path.suffix.lower() in (".csv", ".tsv"):
        try:
            content = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(str(path), "missing_file", f"cannot be read: {error}") from error
        yield from _rows(path.name, content, "\t" if path.suffix.lower() == ".tsv" else ",")
        return
    captions = _captions_by_name(path) if path.suffix.lower() == ".json" else None
    if captions is not None:
        for number, (name, caption) in enumerate(captions.items()):
            yield number, {"video": name, "caption": caption}
        return
    for line in read_objects(path):
        if isinstance(line, Line):
            try:
                yield line.number, mapping(f"{path.name}:{line.number + 1}", "row", line.value)
            except RecordError as error:
                yield line.number, problem(error.key, error.reason, error.message)
        else:
            yield 0, line


def _rows(file_name: str, content: str, delimiter: str) -> Iterator[tuple[int, _Row]]:
    """The rows of a table with a header; one that is no CSV, or has a field over the limit, is a ledger line."""
    yield 0, Expected(content.count("\n"))
    csv.field_size_limit(MAX_RECORD_BYTES)  # of the process; the package's own is 131,072 characters
    rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter)
    for number in itertools.count():
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield number, problem(f"{file_name}:{rows.line_num + 1}", "bad_csv", str(error))
            continue
        if row is None:
            return
        yield number, {name.strip().lower(): value for name, value in row.items() if isinstance(name, str)}


def _captions_by_name(path: Path) -> dict[str, str] | None:
    """A file that is one object {clip: caption}; None for any other form."""
    try:
        content = read_json(path)
    except RecordError as error:
        if error.reason == "bad_json":  # perhaps JSON lines
            return None
        raise
    if isinstance(content, dict) and all(isinstance(value, str) for value in content.values()):
        return content
    return None
