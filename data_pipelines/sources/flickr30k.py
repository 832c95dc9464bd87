"""Flickr30k Entities → documents with captions whose phrases have boxes.

Format (github.com/BryanPlummer/flickr30k_entities): Sentences/ID.txt, a caption a line, phrases in brackets,
`[/EN#1/people Two men] wearing [/EN#2/clothing hats] .`; Annotations/ID.xml, objects with the phrases' numbers (`name`)
and a box (`bndbox`), or none (`nobndbox`, `scene`). Pictures are ID.jpg. A phrase without a box stays plain text.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from data_pipelines.errors import DataError, RecordError
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.item import Annotations, Box, Entries, Expected, Grounded, Item, MediaSource, problem
from data_pipelines.sources.keys import key_of

HELP = "Flickr30k Entities: captions whose phrases have boxes"
MAX_XML_BYTES = 4 << 20
_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\]]+)*\s+([^\]]*)\]")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import flickr30k`."""
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the pictures, ID.jpg")
    parser.add_argument("--sentences", type=Path, required=True, metavar="DIR", help="Sentences, ID.txt")
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="Annotations, ID.xml")
    parser.add_argument("--ids", type=Path, metavar="FILE", help="a split's ids, one a line (train.txt; default: all)")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_flickr30k(options.images, options.sentences, options.annotations, options.ids)


def read_flickr30k(images: Path, sentences: Path, annotations: Path, ids: Path | None = None) -> Entries:
    """One item a picture, in order of the ids."""
    if not sentences.is_dir() or not annotations.is_dir():
        raise RecordError(str(sentences), "missing_file", f"{sentences} and {annotations} must be folders")
    listed = ids.read_text(encoding="utf-8").split() if ids else sorted(path.stem for path in sentences.glob("*.txt"))
    yield Expected(len(listed))
    for name in listed:
        key = key_of(name)
        try:
            picture = resolve_media(f"{name}.jpg", images, None, key)
            boxes, size = _read_boxes(key, resolve_media(f"{name}.xml", annotations, None, key))
            captions = read_sentences(key, resolve_media(f"{name}.txt", sentences, None, key), boxes)
            media = (MediaSource(picture.name, "image", picture, size=size),)
            grounded = tuple(caption for caption in captions if caption.spans)
            plain = tuple(caption.caption for caption in captions if not caption.spans)
            yield Item(key, Annotations(captions=plain, grounded=grounded), media)
        except DataError as error:
            yield problem(key, error.reason, error.message)


def read_sentences(key: str, path: Path, boxes: dict[str, tuple[Box, ...]]) -> list[Grounded]:
    """The captions of a sentence file with the spans of their phrases that have boxes.

    Example: "[/EN#1/people A man] sits ." with {"1": (box,)} is ("A man sits .", ((0, 5, (box,)),)).
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RecordError(key, "bad_text", f"{path.name} is not UTF-8 at byte {error.start}") from error
    captions = []
    for line in lines:
        told, end, spans = "", 0, []
        for match in _PHRASE.finditer(line.strip()):
            told += line.strip()[end : match.start()]
            if match[1] in boxes and match[2].strip():
                spans.append((len(told), len(told) + len(match[2]), boxes[match[1]]))
            told, end = told + match[2], match.end()
        told += line.strip()[end:]
        if told.strip():
            captions.append(Grounded(told, tuple(spans)))
    return captions


def _read_boxes(key: str, path: Path) -> tuple[dict[str, tuple[Box, ...]], tuple[int, int] | None]:
    """Boxes by phrase number, and the annotated size. Document types and entities in the XML are refused."""
    data = path.read_bytes()
    if len(data) > MAX_XML_BYTES or b"<!" in data:
        raise RecordError(key, "bad_xml", f"{path.name}: too large, or with declarations that these files never have")
    try:
        root = ElementTree.fromstring(data)
        boxes: dict[str, list[Box]] = defaultdict(list)
        for thing in root.iter("object"):
            place = thing.find("bndbox")
            if place is None:
                continue
            box = tuple(float(place.findtext(side, "")) for side in _SIDES)
            for name in thing.findall("name"):
                boxes[(name.text or "").strip()].append(box)
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    except (ElementTree.ParseError, ValueError) as error:
        raise RecordError(key, "bad_xml", f"{path.name}: {error}") from error
    size = (width, height) if width > 0 and height > 0 else None
    return {name: tuple(listed) for name, listed in boxes.items()}, size
