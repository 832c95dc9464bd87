"""Any Hugging Face dataset → documents, by a small mapping of its columns in YAML; streaming too.

    load: {path: lmms-lab/RefCOCOg, split: train, streaming: true}   # arguments of datasets.load_dataset
    media: [{column: image, kind: image}]        # column of an image, a clip, or a list of them
    captions: [caption]                          # columns of text (or lists of text)
    question: question                           # with answer: a column of text, or of a list whose commonest counts
    answer: answers
    messages: conversations                      # a chat column in any form that `import chat` reads
    text: text                                   # a document to be learnt whole
    label: label                                 # a class, by name or ClassLabel number
    boxes: {column: objects.bbox, phrases: objects.category, format: xywh, relative: false}   # names or ClassLabels
    lines: {column: ocr.quads, texts: ocr.text}
    score: similarity
    task: vqa                                    # optional

Dots lead into nested columns. Box formats: xyxy, xywh, cxcywh; `relative` counts in fractions of the picture. Media are
stored in their original bytes. Code of a dataset is never run (`trust_remote_code` is refused), and a picture that is
given by path only is read under --media-root alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from data_pipelines.decode.chat_forms import named_parts, read_turns, trim
from data_pipelines.decode.fields import coordinates, fail, number, sequence, text
from data_pipelines.decode.grid_tags import split_grid_tags
from data_pipelines.decode.tags import place_media
from data_pipelines.errors import DataError, MediaError, UserError
from data_pipelines.samples import MediaKind
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.compose import text_part, unique_objects
from data_pipelines.sources.item import (
    Annotations,
    Box,
    Entries,
    Expected,
    Item,
    Labelled,
    MediaSource,
    Question,
    TextLine,
    problem,
)
from data_pipelines.sources.quads import read_corners
from data_pipelines.sources.vqa import best_answer

HELP = "any Hugging Face dataset, by a mapping of its columns in YAML"
_FIELDS = (
    "load", "media", "captions", "question", "answer", "messages", "text", "label", "boxes", "lines", "score", "task"
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import huggingface`."""
    parser.add_argument("mapping", type=Path, metavar="YAML", help="what to load and what its columns mean")
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="where pictures given by path lie")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N rows (0: all)")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_dataset(read_mapping(options.mapping), options.media_root, options.limit)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises:
        UserError: not YAML, unknown fields, nothing to load, or a wish to run the dataset's code.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("load"), dict):
        raise UserError(f"{path}: needs `load:` with the arguments of datasets.load_dataset, and a mapping of columns")
    for name in content:
        if name not in _FIELDS:
            raise UserError(f"{path}: unknown field {name!r}; known: {', '.join(_FIELDS)}")
    if content["load"].get("trust_remote_code"):
        raise UserError(f"{path}: trust_remote_code would run the dataset's own code; use its parquet files instead")
    return content


def read_dataset(mapping: dict[str, Any], media_root: Path | None, limit: int = 0) -> Entries:
    """One item a row, keyed by its number."""
    features, rows, total = _load(mapping)
    if total is not None:
        yield Expected(min(total, limit) if limit else total)
    for count, row in enumerate(rows):
        if limit and count >= limit:
            return
        key = f"{count:08d}"
        try:
            yield row_item(key, row, mapping, features, media_root)
        except DataError as error:
            yield problem(key, error.reason, error.message)


def row_item(key: str, row: dict[str, Any], mapping: dict[str, Any], features: Any, media_root: Path | None) -> Item:
    """The document of one row.

    Raises:
        DataError: a column is absent or of another kind than the mapping says.
    """
    media = _media(key, row, mapping, media_root)
    messages = _messages(key, row, mapping, media)
    objects = _objects(key, row, mapping, features)
    annotations = Annotations(
        captions=tuple(words for column in _names(mapping.get("captions")) for words in _texts(key, row, column)),
        questions=_questions(key, row, mapping),
        label=_label(key, row, mapping, features),
        objects=objects,
        referring=unique_objects(objects),
        lines=_lines(key, row, mapping),
        messages=messages,
    )
    score = None if "score" not in mapping else number(key, "score", _column(key, row, mapping["score"]), -1e9, 1e9)
    return Item(key, annotations, media, mapping.get("task"), score)


def _load(mapping: dict[str, Any]) -> tuple[Any, Iterator[dict[str, Any]], int | None]:
    """The dataset's features, its rows, media columns as bytes or paths instead of decoded, and their number.

    The number is that of the dataset's card while streaming, None where there is none.
    """
    import datasets  # here, because it takes a second to import and only this source needs it

    dataset = datasets.load_dataset(**mapping["load"])
    if hasattr(dataset, "keys"):
        raise UserError(f"load: name a split ({', '.join(dataset.keys())})")
    for entry in mapping.get("media") or []:
        feature = (dataset.features or {}).get(entry["column"])
        nested = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
        for kind in (datasets.Image, datasets.Video):
            if isinstance(feature, kind):
                dataset = dataset.cast_column(entry["column"], kind(decode=False))
            elif isinstance(nested, kind):
                dataset = dataset.cast_column(entry["column"], datasets.List(kind(decode=False)))
    splits = dataset.info.splits or {}
    total = (
        len(dataset) if hasattr(dataset, "__len__") else getattr(splits.get(str(dataset.split)), "num_examples", None)
    )
    return dataset.features, iter(dataset), total or None


def _column(key: str, row: dict[str, Any], path: str) -> Any:
    """The value of a column; "objects.bbox" is the field of a nested column, or a list of it over a list of structs."""
    value: Any = row
    for step in path.split("."):
        if isinstance(value, list):
            value = [entry.get(step) if isinstance(entry, dict) else None for entry in value]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            fail(key, path, sorted(row), "no such column; the row has these")
    return value


def _media(key: str, row: dict[str, Any], mapping: dict[str, Any], root: Path | None) -> tuple[MediaSource, ...]:
    relative = bool((mapping.get("boxes") or {}).get("relative"))
    sources = []
    for entry in mapping.get("media") or []:
        kind: MediaKind = "video" if entry.get("kind") == "video" else "image"
        value = _column(key, row, entry["column"])
        for given in value if isinstance(value, list) else [value]:
            if given is not None:
                sources.append(_medium(key, entry["column"], given, kind, root, relative))
    return tuple(sources)


def _medium(key: str, column: str, given: Any, kind: MediaKind, root: Path | None, relative: bool) -> MediaSource:
    if isinstance(given, bytes):
        given = {"bytes": given}
    if isinstance(given, dict) and isinstance(given.get("bytes"), bytes):
        return MediaSource(str(given.get("path") or column), kind, data=given["bytes"], relative=relative)
    named = given.get("path") if isinstance(given, dict) else given
    if root is None:
        raise MediaError(
            key, "missing_media", f"{column} gives a path, not bytes: say with --media-root where it leads"
        )
    if isinstance(named, str) and os.path.isabs(named):  # as imagefolder gives them; outside the root it stays refused
        inside = (named.removeprefix(f"{folder}{os.sep}") for folder in (root.absolute(), root.resolve()))
        named = next((name for name in inside if name != named), named)
    path = resolve_media(named, root, None, key)
    return MediaSource(path.name, kind, path, relative=relative)


def _messages(
    key: str, row: dict[str, Any], mapping: dict[str, Any], media: tuple[MediaSource, ...]
) -> tuple[dict[str, Any], ...]:
    if "text" in mapping:
        words = text(key, mapping["text"], _column(key, row, mapping["text"]))
        return ({"role": "assistant", "content": [text_part(words)]},)
    if "messages" not in mapping:
        return ()
    # Columns of structs hold every field in every part, empty ones as null; media are those of the media columns, in
    # their order, whatever a part calls them.
    told = _without_nulls(_column(key, row, mapping["messages"]))
    turns = [_unnamed(named_parts(key, i, turn)) for i, turn in enumerate(read_turns(key, {"messages": told}))]
    numbers: dict[MediaKind, list[str]] = {"image": [], "video": []}
    for count, source in enumerate(media):
        numbers[source.kind].append(str(count))
    placed = place_media(key, turns, numbers) if media else turns
    return tuple(trim(split_grid_tags(key, placed, [source.kind for source in media])))


def _without_nulls(value: Any) -> Any:
    """Lists and objects without the fields that are null, at any depth."""
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return value


def _unnamed(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message["content"], list):
        return message
    parts = [
        {name: v for name, v in part.items() if name != part["type"] or name == "text"} for part in message["content"]
    ]
    return {**message, "content": parts}


def _questions(key: str, row: dict[str, Any], mapping: dict[str, Any]) -> tuple[Question, ...]:
    if "question" not in mapping:
        return ()
    answer = _column(key, row, mapping["answer"]) if "answer" in mapping else None
    learnt = best_answer(key, answer) if isinstance(answer, list) else text(key, str(mapping.get("answer")), answer)
    return (Question(text(key, mapping["question"], _column(key, row, mapping["question"])), learnt),)


def _label(key: str, row: dict[str, Any], mapping: dict[str, Any], features: Any) -> str | None:
    if "label" not in mapping:
        return None
    value = _class_name(_column(key, row, mapping["label"]), features, mapping["label"])
    return text(key, mapping["label"], value).replace("_", " ")


def _class_name(value: Any, features: Any, path: str) -> Any:
    """The name of a ClassLabel's number at the column `path` of the dataset's features; other values as they are."""
    feature = features
    for step in [*path.split("."), None]:
        while isinstance(feature, list) or hasattr(feature, "feature"):  # a list of the nested feature
            feature = feature[0] if isinstance(feature, list) else feature.feature
        if step is not None:
            feature = feature.get(step) if isinstance(feature, dict) else None
    names = getattr(feature, "names", None)
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value].replace("_", " ")
    return value


def _objects(key: str, row: dict[str, Any], mapping: dict[str, Any], features: Any) -> tuple[Labelled, ...]:
    told = mapping.get("boxes")
    if not told:
        return ()
    boxes = _column(key, row, told["column"])
    phrases = _column(key, row, told["phrases"])
    if boxes and not isinstance(boxes[0], list):
        boxes, phrases = [boxes], [phrases]
    listed = [_class_name(value, features, told["phrases"]) for value in sequence(key, told["phrases"], phrases)]
    if len(boxes) != len(listed):
        fail(key, told["column"], len(boxes), f"boxes, but {len(listed)} phrases", "bad_box")
    return tuple(
        Labelled(text(key, f"{told['phrases']}[{i}]", phrase), (_box(key, i, box, told.get("format", "xyxy")),))
        for i, (box, phrase) in enumerate(zip(boxes, listed, strict=True))
    )


def _box(key: str, i: int, value: object, form: str) -> Box:
    a, b, c, d = coordinates(key, f"boxes[{i}]", value, 4)
    if form == "xywh":
        return (a, b, a + c, b + d)
    if form == "cxcywh":
        return (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    if form != "xyxy":
        raise UserError(f"boxes.format = {form!r}: needs xyxy, xywh or cxcywh")
    return (a, b, c, d)


def _lines(key: str, row: dict[str, Any], mapping: dict[str, Any]) -> tuple[TextLine, ...]:
    told = mapping.get("lines")
    if not told:
        return ()
    quads = sequence(key, told["column"], _column(key, row, told["column"]))
    texts = sequence(key, told["texts"], _column(key, row, told["texts"]))
    if len(quads) != len(texts):
        fail(key, told["column"], len(quads), f"quads, but {len(texts)} texts", "bad_box")
    return tuple(
        TextLine(text(key, f"{told['texts']}[{i}]", words, empty=True), read_corners(key, f"lines[{i}]", quad))
        for i, (quad, words) in enumerate(zip(quads, texts, strict=True))
    )


def _texts(key: str, row: dict[str, Any], column: str) -> list[str]:
    value = _column(key, row, column)
    listed = value if isinstance(value, list) else [value]
    return [text(key, f"{column}[{i}]", words).strip() for i, words in enumerate(listed)]


def _names(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []
