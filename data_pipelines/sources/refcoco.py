"""RefCOCO, RefCOCO+, RefCOCOg → documents that ask where an expression's object is, and what a box shows.

Two published forms, both JSON:

- the authors' refs with instances.json (COCO's form): [{"ann_id", "image_id", "split", "sentences": [{"sent"}]}].
  The authors ship the refs as a pickle, which can run code and is therefore not read here; turn it into JSON once,
  where you trust the file: python -c "import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb')),
  open('refs.json', 'w'))".
- MDETR's finetune_refcoco_train.json: {"images": [{"id", "file_name", "caption", ...}], "annotations": [{"image_id",
  "bbox": [x, y, width, height]}]}, one entry of images per expression.

The expressions of one picture share a document. An expression is asked for its box; the first expression of each object
is also the answer to its box.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import coordinates, fail, mapping, sequence, text
from data_pipelines.decode.written_record import declared_size
from data_pipelines.errors import DataError, RecordError, UserError
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.item import Annotations, Box, Entries, Expected, Item, Labelled, MediaSource, problem
from data_pipelines.sources.json_files import read_json

HELP = "RefCOCO, RefCOCO+, RefCOCOg: expression → box and box → expression"

# (file name, declared size, object, box, expression)
_Expression = tuple[str, tuple[int, int] | None, object, Box, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import refcoco`."""
    parser.add_argument("refs", type=Path, metavar="JSON", help="refs as JSON, or MDETR's finetune_refcoco_*.json")
    parser.add_argument("--instances", type=Path, metavar="JSON", help="instances.json beside the refs")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of COCO's train2014 pictures")
    parser.add_argument("--split", default="train", help="the split to read of the authors' refs (default: train)")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_refcoco(options.refs, options.instances, options.images, options.split)


def read_refcoco(refs: Path, instances: Path | None, images: Path, split: str = "train") -> Entries:
    """One item a picture, in order of its first expression.

    Raises:
        RecordError: a pickle, or files that are not in one of the two forms.
    """
    if refs.suffix in (".p", ".pkl", ".pickle"):
        raise RecordError(
            str(refs), "pickle", "a pickle can run code and is not read; see --help for turning it into JSON"
        )
    content = read_json(refs)
    if isinstance(content, dict):
        expressions = _of_mdetr(refs.name, content)
    elif instances is None:
        raise UserError("refcoco: refs in the authors' form need --instances")
    else:
        expressions = _of_authors(refs.name, content, instances, split)
    pictures: dict[str, list[_Expression]] = defaultdict(list)
    for entry in expressions:
        if isinstance(entry, LedgerEvent):
            yield entry
        else:
            pictures[entry[0]].append(entry)
    yield Expected(len(pictures))
    for number, (name, told) in enumerate(pictures.items()):
        key = f"{number:06d}-{Path(name).stem}".replace(".", "_")
        try:
            path = resolve_media(name, images, None, key)
            yield Item(key, _annotations(told), (MediaSource(path.name, "image", path, size=told[0][1]),))
        except DataError as error:
            yield problem(key, error.reason, f"{len(told)} expressions lost: {error.message}")


def _annotations(told: list[_Expression]) -> Annotations:
    """Expressions that mean two objects of the picture are asked for nothing: they have no one answer."""
    boxes: dict[str, set[Box]] = defaultdict(set)
    for _, _, _, box, words in told:
        boxes[words].add(box)
    asked: dict[str, Labelled] = {}
    first: dict[object, Labelled] = {}
    for _, _, thing, box, words in told:
        if len(boxes[words]) == 1:
            asked[words] = Labelled(words, (box,))
            first.setdefault(thing, asked[words])
    return Annotations(referring=tuple(asked.values()), regions=tuple(first.values()))


def _of_mdetr(name: str, content: dict[str, Any]) -> Iterator[_Expression | LedgerEvent]:
    images = _by_id(name, content, "images")
    for i, value in enumerate(sequence(name, "annotations", content.get("annotations"))):
        key = f"{name}:annotations[{i}]"
        try:
            annotation = mapping(key, "annotation", value)
            found = images.get(_id(annotation, "image_id"))
            if found is None:
                fail(key, "image_id", annotation.get("image_id"), "names no picture", "no_media")
            yield _expression(key, found, annotation, str(annotation.get("original_id", i)), found.get("caption"))
        except DataError as error:
            yield problem(error.key, error.reason, error.message)


def _of_authors(name: str, content: Any, instances: Path, split: str) -> Iterator[_Expression | LedgerEvent]:
    told = mapping(instances.name, "file", read_json(instances))
    images = _by_id(instances.name, told, "images")
    objects = _by_id(instances.name, told, "annotations")
    for i, value in enumerate(sequence(name, "refs", content)):
        key = f"{name}:refs[{i}]"
        try:
            ref = mapping(key, "ref", value)
            if ref.get("split") != split:
                continue
            image, thing = images.get(_id(ref, "image_id")), objects.get(_id(ref, "ann_id"))
            if image is None or thing is None:
                fail(key, "ann_id", ref.get("ann_id"), "names no object of a picture in the instances", "no_media")
            for j, sentence in enumerate(sequence(key, "sentences", ref.get("sentences"))):
                words = mapping(key, f"sentences[{j}]", sentence)
                yield _expression(key, image, thing, ref.get("ann_id"), words.get("sent", words.get("raw")))
        except DataError as error:
            yield problem(error.key, error.reason, error.message)


def _by_id(name: str, content: dict[str, Any], field: str) -> dict[object, dict[str, Any]]:
    """The entries of a list by their ids. One without an id, or with no number or word for it, nothing can refer to."""
    listed = [
        mapping(name, f"{field}[{i}]", entry) for i, entry in enumerate(sequence(name, field, content.get(field)))
    ]
    return {entry["id"]: entry for entry in listed if isinstance(entry.get("id"), int | str)}


def _id(entry: dict[str, Any], field: str) -> object:
    value = entry.get(field)
    return value if isinstance(value, int | str) else None


def _expression(key: str, image: dict[str, Any], thing: dict[str, Any], number: object, words: object) -> _Expression:
    x, y, width, height = coordinates(key, "bbox", thing.get("bbox"), 4)
    name = text(key, "file_name", image.get("file_name"))
    return name, declared_size(image), number, (x, y, x + width, y + height), text(key, "sentence", words).strip()
