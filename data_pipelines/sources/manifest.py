"""A list of mixed items with their annotations → documents: one file that describes a whole folder of many kinds.

    {"items": [{"id": "ocr/00017", "kind": "...", "file": "a.jpg" | ["a.jpg", ...], "annotations": {...}}]}

What an item becomes follows from its annotations, several of which may stand together: "captions" [str]; "boxes"
[{"label", "bbox_xyxy", "iscrowd"}]; "vqa" and "qa" [{"question", "answer", "choices"?, "correct_choice_idx"?}];
"lines" [{"text", "quad"}], "text", "key_values"; "label"; "messages", "conversations" or "messages_list" (chats);
"prompt" with "chosen" (a preferred answer; the rejected one is not learnt); "segments" (text and pictures by turns,
learnt whole).
Items without annotations are text files, chat files and webdataset tars, by their "kind" (text_plain, text_chat,
webdataset_tar). Every item becomes documents or ledger lines that carry its id.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.decode.fields import coordinates, fail, mapping, sequence, text
from data_pipelines.decode.written_record import declared_size
from data_pipelines.errors import DataError
from data_pipelines.samples import LedgerEvent, MediaKind
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.chat import chat_item, read_chats
from data_pipelines.sources.compose import unique_objects
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, Labelled, MediaSource, problem
from data_pipelines.sources.json_files import read_json
from data_pipelines.sources.keys import key_of
from data_pipelines.sources.ocr import page_annotations
from data_pipelines.sources.text import read_text
from data_pipelines.sources.vqa import read_question
from data_pipelines.sources.webdataset_tars import read_tar

HELP = "a manifest of mixed items (captions, boxes, OCR, questions, chats, clips, text, tars) with their annotations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import manifest`."""
    parser.add_argument(
        "manifest", type=Path, metavar="JSON", help='{"items": [{"id", "kind", "file", "annotations"}]}'
    )
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="files lie under here (default: beside it)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only items of these kinds")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_manifest(options.manifest, options.media_root or options.manifest.parent, options.kinds)


def read_manifest(path: Path, root: Path, kinds: list[str] | None = None) -> Entries:
    """The documents of every item of the manifest, keyed by the items' ids."""
    content = mapping(path.name, "manifest", read_json(path))
    listed = sequence(path.name, "items", content.get("items"))
    yield Expected(len(listed))
    for number, value in enumerate(listed):
        key = f"items/{number:06d}"
        try:
            entry = mapping(key, f"items[{number}]", value)
            key = _key(entry.get("id"), key)
            if kinds is None or entry.get("kind") in kinds:
                yield from read_item(key, entry, root)
        except DataError as error:
            yield problem(key, error.reason, error.message)


def read_item(key: str, entry: dict[str, Any], root: Path) -> Entries:
    """The documents of one item.

    Raises:
        DataError: the item is unusable as a whole.
    """
    kind = entry.get("kind")
    named = entry.get("file", entry.get("files"))
    files = [resolve_media(name, root, None, key) for name in (named if isinstance(named, list) else [named])]
    told = mapping(key, "annotations", entry.get("annotations") or {})
    if kind == "text_plain":
        yield from _renamed(read_text(files[0], key), key)
    elif kind == "text_chat":
        yield from _renamed(read_chats(files[0], root, key), key)
    elif kind == "webdataset_tar":
        yield from _renamed(read_tar(files[0], key), key)
    elif "segments" in told:
        yield _interleaved(key, told, root)
    elif "messages" in told or "conversations" in told or "chosen" in told:
        yield _chat(key, told, named, files, root)
    else:
        yield from _annotated(key, entry, told, files, root)


def _key(given: object, otherwise: str) -> str:
    """An item's id as a key: "ocr/00017" stays; anything a tar could not hold is replaced."""
    return "/".join(key_of(piece) for piece in given.split("/")) if isinstance(given, str) and given else otherwise


def _renamed(entries: Entries, key: str) -> Entries:
    """Problems of a file inside the manifest carry the item's id; the manifest alone says what is expected."""
    for entry in entries:
        if isinstance(entry, Expected):
            continue
        if isinstance(entry, LedgerEvent) and not entry.key.startswith(key):
            yield replace(entry, key=f"{key}: {entry.key}")
        else:
            yield entry


def _chat(key: str, told: dict[str, Any], named: object, files: list[Path], root: Path) -> Item:
    data: dict[str, Any] = {}
    if "chosen" in told:
        asked = sequence(key, "prompt", told.get("prompt"))
        data["messages"] = [*asked, *sequence(key, "chosen", told["chosen"])]
        root = files[0].parent  # preference sets name their pictures without the folder
    else:
        field = "messages" if "messages" in told else "conversations"
        data["messages" if field == "messages" else "conversations"] = told[field]
    turns = sequence(key, "messages", data.get("messages", data.get("conversations")))
    by_tags = not any(isinstance(turn, dict) and _names_media(turn.get("content")) for turn in turns)
    if by_tags:
        kind = _kind(files[0])
        data[f"{kind}s"] = named if isinstance(named, list) else [named]
    return chat_item(key, data, root, None, "video" if by_tags and _kind(files[0]) == "video" else "chat")


def _names_media(content: object) -> bool:
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in content)


def _kind(path: Path) -> MediaKind:
    return "image" if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff") else "video"


def _interleaved(key: str, told: dict[str, Any], root: Path) -> Item:
    parts: list[dict[str, Any]] = []
    sources: list[MediaSource] = []
    for i, value in enumerate(sequence(key, "segments", told["segments"])):
        segment = mapping(key, f"segments[{i}]", value)
        if segment.get("type") == "text":
            parts.append({"type": "text", "text": text(key, f"segments[{i}].text", segment.get("text"), empty=True)})
        elif segment.get("type") == "image":
            path = resolve_media(segment.get("image"), root, None, key)
            parts.append({"type": "image", "image": str(len(sources))})
            sources.append(MediaSource(path.name, "image", path))
        else:
            fail(key, f"segments[{i}].type", segment.get("type"), "needs text or image")
    message = {"role": "assistant", "content": parts}
    return Item(key, Annotations(messages=(message,)), tuple(sources), "interleaved")


def _annotated(key: str, entry: dict[str, Any], told: dict[str, Any], files: list[Path], root: Path) -> Entries:
    """A picture or clip with annotations of any kinds; a question or chat that cannot be used is a ledger line."""
    page = Annotations()
    if any(field in told for field in ("lines", "text", "key_values")):
        page = page_annotations(key, told)
    objects = [_object(key, i, value) for i, value in enumerate(sequence(key, "boxes", told.get("boxes") or []))]
    captions = [
        text(key, f"captions[{i}]", value).strip()
        for i, value in enumerate(sequence(key, "captions", told.get("captions") or []))
    ]
    questions = []
    for field in ("vqa", "qa"):
        for i, value in enumerate(sequence(key, field, told.get(field) or [])):
            try:
                questions.append(read_question(key, mapping(key, f"{field}[{i}]", value)))
            except DataError as error:
                yield problem(f"{key}: {field}[{i}]", error.reason, error.message)
    kind: MediaKind = "video" if entry.get("kind") == "video" else "image"
    annotations = replace(
        page,
        captions=tuple(captions),
        objects=tuple(labelled for labelled in objects if not labelled.crowd),
        referring=unique_objects(objects),
        questions=tuple(questions),
        label=None if told.get("label") is None else text(key, "label", told["label"]),
    )
    for i, chat in enumerate(sequence(key, "messages_list", told.get("messages_list") or [])):
        name = str(files[0].relative_to(root.resolve()))
        try:
            item = chat_item(key, {"messages": chat, f"{kind}s": [name]}, root, None)
        except DataError as error:
            yield problem(f"{key}: messages_list[{i}]", error.reason, error.message)
            continue
        first = not annotations.messages and not annotations.captions
        more = [message if first else _without_media(message) for message in item.annotations.messages]
        annotations = replace(annotations, messages=(*annotations.messages, *more))
    size = _annotated_size(told) or declared_size(entry)
    media = MediaSource(files[0].name, kind, files[0], size=size if kind == "image" else None)
    yield Item(key, annotations, (media,), "video" if kind == "video" else None)


def _object(key: str, i: int, value: object) -> Labelled:
    fields = mapping(key, f"boxes[{i}]", value)
    label = text(key, f"boxes[{i}].label", fields.get("label"))
    box = coordinates(key, f"boxes[{i}].bbox_xyxy", fields.get("bbox_xyxy"), 4)
    return Labelled(label, (box,), crowd=bool(fields.get("iscrowd")))


def _annotated_size(told: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) of "annotated_size", which WildReceipt writes for pictures that were scaled afterwards."""
    size = told.get("annotated_size")
    if isinstance(size, list) and len(size) == 2:
        return declared_size({"width": size[0], "height": size[1]})
    return None


def _without_media(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if part["type"] not in ("image", "video")]}
