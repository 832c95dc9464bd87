"""OCR pages → documents: lines of text with their quads.

Read forms:

- JSON or JSON lines, one object a picture: {"image": "a.jpg", "lines": [{"text": "TOTAL", "quad": [8 numbers]}]}; also
  "box" (4 numbers) for "quad", and WildReceipt's {"file_name", "annotations": [{"box": [8 numbers], "text"}]}.
- a folder of pictures with one text file each (SROIE, ICDAR 2015): lines `x1,y1,x2,y2,x3,y3,x4,y4,text`, named
  NAME.txt, NAME.csv, NAME.box.csv or gt_NAME.txt, beside the picture or in --labels. `###` marks unreadable text.
- SROIE's key values, a JSON object a picture, become a question: task 3's published folder, in which NAME.txt holds
  them, alone; or beside the lines, from --key-values (NAME.txt or NAME.json) or as NAME.key.json.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import fail, mapping, sequence, text
from data_pipelines.decode.written_record import declared_size
from data_pipelines.errors import DataError, RecordError
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.inputs import add_files, each_file, each_object, media_in
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, MediaSource, TextLine, problem
from data_pipelines.sources.json_files import read_json
from data_pipelines.sources.keys import key_of
from data_pipelines.sources.quads import clockwise, read_corners

HELP = "OCR pages: JSON manifests (text + quads), or folders as of SROIE and ICDAR 2015"
UNREADABLE = "###"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import ocr`."""
    add_files(parser, "manifests, or folders of pictures", media_root=True, name="inputs", metavar="PATH")
    parser.add_argument(
        "--labels", type=Path, metavar="DIR", help="folder of the text files (default: beside pictures)"
    )
    parser.add_argument("--key-values", type=Path, metavar="DIR", help="folder of SROIE's key values (JSON objects)")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""

    def read_one(path: Path, prefix: str) -> Entries:
        if path.is_dir():
            return read_folder(path, options.labels or path, prefix, options.key_values)
        return read_manifest(path, options.media_root or path.parent, prefix)

    return each_file(options.inputs, read_one)


def read_manifest(path: Path, media_root: Path, prefix: str) -> Entries:
    """One item for every object of a JSON or JSON-lines manifest."""

    def page(key: str, entry: dict[str, Any]) -> list[Item]:
        named = next((entry[field] for field in ("image", "file_name", "img", "file") if field in entry), None)
        image = resolve_media(named, media_root, path.parent, key)
        media = (MediaSource(image.name, "image", image, size=declared_size(entry)),)
        return [Item(key, page_annotations(key, entry), media, "ocr")]

    return each_object(path, prefix, "page", page)


def page_annotations(key: str, entry: dict[str, Any]) -> Annotations:
    """Lines, transcription and key values of one page object.

    Raises:
        RecordError: no "lines", "annotations" or "text", or one that is not of the documented form.
    """
    listed = entry.get("lines", entry.get("annotations", entry.get("words")))
    words = entry.get("text")
    if listed is None and words is None:
        fail(key, "page", sorted(entry), 'needs "lines" or "text"', "no_annotation")
    lines = []
    for i, value in enumerate(sequence(key, "lines", listed if listed is not None else [])):
        line = mapping(key, f"lines[{i}]", value)
        corners = next((line[field] for field in ("quad", "box", "polygon", "points", "bbox") if field in line), None)
        said = line.get("text", line.get("transcription"))
        if said == UNREADABLE or line.get("ignore"):
            continue
        said = None if said is None else text(key, f"lines[{i}].text", said, empty=True)
        lines.append(TextLine(said, read_corners(key, f"lines[{i}].quad", corners)))
    values = mapping(key, "key_values", entry.get("key_values") or {})
    fields = tuple((name, value) for name, value in values.items() if isinstance(value, str) and value.strip())
    return Annotations(
        lines=tuple(lines),
        words=None if words is None else text(key, "text", words),
        fields=fields,
    )


def read_folder(images: Path, labels: Path, prefix: str, key_values: Path | None = None) -> Entries:
    """One item for every picture of a folder, in order of their names; a picture without text file is a ledger line."""
    if key_values is not None and not key_values.is_dir():
        raise RecordError(str(key_values), "missing_file", "is no folder")
    pictures = media_in(images, "image")
    yield Expected(len(pictures))
    for path in pictures:
        if not path.is_file():
            continue
        key = f"{prefix}/{key_of(path.stem)}"
        try:
            image = resolve_media(path.name, images, None, key)
            label = _label_file(path.stem, labels)
            if label is None:
                raise RecordError(key, "no_annotation", f"no text file for {path.name} in {labels.name}")
            stated = _key_value_file(path.stem, labels, key_values)
            fields = () if stated is None else _key_values(key, stated)
            if _holds_object(label):
                annotations = Annotations(fields=fields or _key_values(key, label))
            else:
                annotations = Annotations(lines=read_quad_lines(key, label), fields=fields)
            yield Item(key, annotations, (MediaSource(path.name, "image", image),), "ocr")
        except DataError as error:
            yield problem(key, error.reason, error.message)


def read_quad_lines(key: str, path: Path) -> tuple[TextLine, ...]:
    """The lines `x1,y1,...,x4,y4,text` of a text file; the text may hold commas, `###` is left out.

    Raises:
        RecordError: not UTF-8, or a line without 8 leading numbers.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(key, "bad_text", f"{path.name}: {error}") from error
    lines = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        pieces = line.rstrip("\r").split(",", 8)
        try:
            quad = tuple(float(piece) for piece in pieces[:8])
        except ValueError:
            quad = ()
        if len(quad) != 8:
            fail(key, f"{path.name}:{number}", line, "needs x1,y1,x2,y2,x3,y3,x4,y4,text", "bad_box")
        said = _unquoted(pieces[8]) if len(pieces) == 9 else None
        if said != UNREADABLE:
            lines.append(TextLine(said, clockwise(quad)))
    return tuple(lines)


def _unquoted(field: str) -> str:
    """A text field that was written as CSV ("a ""b"", c") as text; other quotes belong to the text."""
    if len(field) >= 2 and field.startswith('"') and field.endswith('"'):
        return next(csv.reader(io.StringIO(field)), [field])[0]
    return field


def _label_file(stem: str, folder: Path) -> Path | None:
    names = (f"{stem}.txt", f"{stem}.csv", f"{stem}.box.csv", f"gt_{stem}.txt")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _key_value_file(stem: str, labels: Path, folder: Path | None) -> Path | None:
    paths = [labels / f"{stem}.key.json"]
    if folder is not None:
        paths += [folder / f"{stem}.txt", folder / f"{stem}.json", folder / f"{stem}.key.json"]
    return next((path for path in paths if path.is_file()), None)


def _holds_object(path: Path) -> bool:
    """Whether a text file holds a JSON object instead of lines, which begin with a number."""
    with open(path, "rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _key_values(key: str, path: Path) -> tuple[tuple[str, str], ...]:
    """The named values of a page that are not blank.

    Raises:
        RecordError: the file is no JSON object.
    """
    values = mapping(key, path.name, read_json(path))
    return tuple((name, value) for name, value in values.items() if isinstance(value, str) and value.strip())
