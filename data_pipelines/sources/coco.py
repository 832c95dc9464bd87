"""COCO: instances (boxes with category names) and captions → one document a picture.

Format: https://cocodataset.org/#format-data. `images` [{id, file_name, width, height}], `annotations` [{image_id,
category_id, bbox [x, y, width, height], iscrowd}] or [{image_id, caption}], `categories` [{id, name}].
A picture's document asks for its captions, for all objects with their boxes, and for every object whose name occurs
once (referring). Crowd boxes are listed nowhere: they mark areas, not objects.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import coordinates, mapping, sequence, text
from data_pipelines.decode.written_record import declared_size
from data_pipelines.errors import DataError, RecordError, UserError
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.compose import unique_objects
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, Labelled, MediaSource, problem
from data_pipelines.sources.json_files import read_json

HELP = "COCO instances and captions: one document a picture with captions, boxes and referring questions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import coco`."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--instances", type=Path, metavar="JSON", help="instances_*.json: boxes")
    parser.add_argument("--captions", type=Path, metavar="JSON", help="captions_*.json")
    parser.add_argument("--no-referring", action="store_true", help="do not ask where an object is")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    if options.instances is None and options.captions is None:
        raise UserError("coco: give --instances, --captions, or both")
    yield from read_coco(options.images, options.instances, options.captions, referring=not options.no_referring)


def read_coco(images: Path, instances: Path | None, captions: Path | None, referring: bool = True) -> Entries:
    """One item a picture that either file lists, in order of its first appearance.

    Raises:
        RecordError: an annotation file is missing or not in COCO's form. A single broken annotation is a ledger line.
    """
    pictures: dict[int, dict[str, Any]] = {}
    objects: dict[int, list[Labelled]] = defaultdict(list)
    texts: dict[int, list[str]] = defaultdict(list)
    for path in (instances, captions):
        if path is None:
            continue
        content = mapping(path.name, "file", read_json(path))
        for image in _section(path.name, content, "images"):
            pictures.setdefault(_id(path.name, image), image)
        names = {
            _id(path.name, category): text(path.name, "categories.name", category.get("name"))
            for category in (_section(path.name, content, "categories") if "categories" in content else [])
        }
        for annotation in _section(path.name, content, "annotations"):
            try:
                number = _id(path.name, annotation, "image_id")
                if number not in pictures:
                    raise RecordError(path.name, "no_media", f"annotation of image_id {number}, which no picture has")
                if "caption" in annotation:
                    texts[number].append(text(path.name, "caption", annotation["caption"]).strip())
                else:
                    objects[number].append(_object(path.name, annotation, names))
            except RecordError as error:
                yield problem(f"{path.name}:{annotation.get('id')}", error.reason, error.message)
    yield Expected(len(pictures))
    for number, image in pictures.items():
        key = f"{number:012d}"
        try:
            yield _item(key, image, images, objects[number], texts[number], referring)
        except DataError as error:
            yield problem(key, error.reason, error.message)


def _section(name: str, content: dict[str, Any], field: str) -> list[dict[str, Any]]:
    listed = sequence(name, field, content.get(field))
    return [mapping(name, f"{field}[{i}]", entry) for i, entry in enumerate(listed)]


def _id(name: str, entry: dict[str, Any], field: str = "id") -> int:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError(name, "bad_field", f"{field} = {value!r}: needs an integer")
    return value


def _object(name: str, annotation: dict[str, Any], names: dict[int, str]) -> Labelled:
    label = names.get(_id(name, annotation, "category_id"))
    if label is None:
        raise RecordError(name, "bad_field", f"category_id {annotation['category_id']} names no category")
    x, y, width, height = coordinates(name, "bbox", annotation.get("bbox"), 4)
    return Labelled(label, ((x, y, x + width, y + height),), crowd=bool(annotation.get("iscrowd")))


def _item(
    key: str, image: dict[str, Any], folder: Path, objects: list[Labelled], captions: list[str], referring: bool
) -> Item:
    path = resolve_media(image.get("file_name"), folder, None, key)
    single = tuple(labelled for labelled in objects if not labelled.crowd)
    annotations = Annotations(
        captions=tuple(captions),
        objects=single,
        referring=unique_objects(objects) if referring else (),
    )
    return Item(key, annotations, (MediaSource(path.name, "image", path, size=declared_size(image)),))
