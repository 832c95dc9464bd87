"""Webdataset tars of others → this project's shards: img2dataset (jpg + txt + json), GRIT, and our own form.

Enters: tars that hold KEY.jpg or KEY.mp4 with KEY.txt or KEY.json ("caption"; GRIT adds "noun_chunks" and "ref_exps",
spans of the caption with boxes in fractions of the picture: [start, end, x1, y1, x2, y2, score]), or whatever a trainer
reads from a tar. Members are read in place by offset; nothing is extracted, names are never paths. A sample's damage
costs that sample, a tar's damage what lies behind it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_pipelines.config import MAX_RECORD_BYTES
from data_pipelines.decode.fields import fail, load_json, mapping, number, sequence, text
from data_pipelines.decode.members import media_kind, media_names
from data_pipelines.decode.short_form import expand_short_form
from data_pipelines.decode.tags import expand_tags
from data_pipelines.errors import DataError, RecordError
from data_pipelines.shards.storage import LocalFile
from data_pipelines.shards.tar import TarSample, scan_tar
from data_pipelines.sources.inputs import add_files, each_file
from data_pipelines.sources.item import Annotations, Entries, Expected, Grounded, Item, Labelled, MediaSource, problem
from data_pipelines.sources.keys import key_of

HELP = "webdataset tars: img2dataset, GRIT, or shards in this project's form"
_SCORES = ("similarity", "clip_similarity_vitb32", "clip_similarity_vitl14", "clip_l14_similarity_score", "score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import webdataset`."""
    add_files(parser, "webdataset shards", name="tars", metavar="TAR")
    parser.add_argument(
        "--min-score", type=float, default=0.0, metavar="S", help="GRIT: leave out boxes below this score"
    )


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    return each_file(options.tars, lambda path, key: read_tar(path, key, options.min_score))


def read_tar(path: Path, prefix: str, min_score: float = 0.0) -> Entries:
    """One item a sample, in the order of the tar; the shard's problems are ledger lines."""
    try:
        file = LocalFile(str(path))
    except DataError as error:
        yield problem(path.name, error.reason, error.message)
        return
    try:
        scan = scan_tar(file)
        for damage in scan.problems:
            if damage.reason == "scattered_key":
                continue  # nothing is lost: the members stand together in the new shard
            yield problem(f"{path.name}: {damage.key}", damage.reason, damage.message)
        yield Expected(len(scan.samples))
        for count, sample in enumerate(scan.samples):
            key = f"{prefix}/{count:06d}-{key_of(sample.key)}"
            try:
                yield _item(key, sample, file, path, min_score)
            except DataError as error:
                yield problem(key, error.reason, error.message)
    finally:
        file.close()


def _item(key: str, sample: TarSample, file: LocalFile, path: Path, min_score: float) -> Item:
    texts = {name: _read(key, name, sample, file) for name in ("json", "txt") if name in sample.members}
    names = media_names(sample.members)
    if not texts:
        fail(key, "members", sorted(sample.members), "the sample has neither a json nor a txt member", "no_record")
    data = mapping(key, "json", load_json(key, texts["json"])) if "json" in texts else {}
    sources = tuple(_source(name, sample, path) for name in names)
    if "messages" in data:
        return _own_form(key, data, expand_tags(key, data), names, sources)
    if "txt" in texts and data.get("caption") is None and data.get("text") is None:
        try:
            data["caption"] = texts["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecordError(key, "bad_text", f"txt member is not UTF-8 at byte {error.start}") from error
    if data.get("boxes") or data.get("quads") or len(sources) != 1 or sources[0].kind != "image":
        expanded, task = expand_short_form(key, data, names)
        return _own_form(key, {"task": task, **data}, expanded, names, sources)
    caption = text(key, "caption", data.get("caption"))
    grounded, referring = read_grit(key, data, caption, min_score)
    relative = MediaSource(names[0], "image", path, sources[0].offset, sources[0].length, relative=True)
    annotations = Annotations(captions=(caption.strip(),), grounded=grounded, referring=referring)
    return Item(key, annotations, (relative,), score=_score(data))


def _score(data: dict[str, Any]) -> float | None:
    """The similarity of picture and caption under any of its usual names."""
    given = (data.get(name) for name in _SCORES)
    return next(
        (float(score) for score in given if isinstance(score, int | float) and not isinstance(score, bool)), None
    )


def read_grit(
    key: str, data: dict[str, Any], caption: str, min_score: float
) -> tuple[tuple[Grounded, ...], tuple[Labelled, ...]]:
    """GRIT's noun chunks as a grounded caption, its referring expressions as questions; boxes are fractions 0..1.

    Nested boxes are left to the cleaning rules.
    """
    chunks = _spans(key, "noun_chunks", data.get("noun_chunks") or [], caption, min_score)
    expressions = _spans(key, "ref_exps", data.get("ref_exps") or [], caption, min_score)
    by_span: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    for start, end, box in chunks:
        by_span.setdefault((start, end), []).append(box)
    spans = tuple((start, end, tuple(boxes)) for (start, end), boxes in by_span.items())
    by_phrase: dict[str, list[tuple[float, ...]]] = {}
    for start, end, box in expressions:
        by_phrase.setdefault(caption[start:end].strip(), []).append(box)
    referring = tuple(Labelled(phrase, tuple(boxes)) for phrase, boxes in by_phrase.items() if phrase)
    return ((Grounded(caption, spans),) if spans else ()), referring


def _spans(
    key: str, field: str, listed: object, caption: str, min_score: float
) -> list[tuple[int, int, tuple[float, ...]]]:
    spans = []
    for i, value in enumerate(sequence(key, field, listed)):
        entry = sequence(key, f"{field}[{i}]", value)
        if len(entry) not in (6, 7):
            fail(key, f"{field}[{i}]", entry, "needs start, end, x1, y1, x2, y2, score", "bad_box")
        numbers = [number(key, f"{field}[{i}]", entry_value, -1e6, 1e6, "bad_box") for entry_value in entry]
        start, end = int(numbers[0]), int(numbers[1])
        if not 0 <= start < end <= len(caption):
            fail(key, f"{field}[{i}]", entry, f"span outside the caption of {len(caption)} characters", "bad_box")
        if len(numbers) == 6 or numbers[6] >= min_score:
            spans.append((start, end, tuple(numbers[2:6])))
    return spans


def _own_form(
    key: str, data: dict[str, Any], told: object, names: tuple[str, ...], sources: tuple[MediaSource, ...]
) -> Item:
    """A record of our own, whose messages are `told`: their parts name members, which get new numbers."""
    messages = []
    for i, entry in enumerate(sequence(key, "messages", told)):
        message = mapping(key, f"messages[{i}]", entry)
        content = message.get("content")
        if isinstance(content, list):
            content = [_renamed(key, f"messages[{i}].content[{j}]", part, names) for j, part in enumerate(content)]
        messages.append({**message, "content": content})
    return Item(key, Annotations(messages=tuple(messages)), sources, data.get("task") or "chat", _score(data))


def _renamed(key: str, field: str, part: object, names: tuple[str, ...]) -> dict[str, Any]:
    entry = mapping(key, field, part)
    for kind in ("image", "video"):
        if kind in entry:
            if entry[kind] not in names:
                fail(key, f"{field}.{kind}", entry[kind], f"no member of this sample; it has {list(names)}", "no_media")
            return {**entry, kind: str(names.index(entry[kind]))}
    return entry


def _source(name: str, sample: TarSample, path: Path) -> MediaSource:
    member = sample.members[name]
    return MediaSource(name, media_kind(name) or "image", path, member.offset, member.size)


def _read(key: str, name: str, sample: TarSample, file: LocalFile) -> bytes:
    member = sample.members[name]
    if member.size > MAX_RECORD_BYTES:
        fail(key, name, f"{member.size} bytes", f"at most {MAX_RECORD_BYTES} bytes", "bad_json")
    return file.read(member.offset, member.size)
