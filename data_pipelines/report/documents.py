"""A batch → its documents as a page shows them: tokens with supervision and positions, media with boxes and times.

Enters: a `PackedBatch` as training gets it, and the records its documents were made from. Leaves: JSON-able dicts, and
picture files. Everything shown is read out of the batch: ids, labels, positions, patches; the record gives words for
it (names, phrases, boxes), the tokenizer the text of each token. Costs about 10 ms a picture, 5 µs a token.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode.clip_facts import ClipError, nearest_frames, open_clip, sample_frame_times
from data_pipelines.encode.boxes import GridPoints, box_points, quad_points
from data_pipelines.index.read import media_refs
from data_pipelines.report.pictures import save_picture, save_strip, unpatch
from data_pipelines.samples import IGNORE_INDEX, Media, PackedBatch, Record, Region, Text
from data_pipelines.tokenizer import SpecialTokens, TextTokenizer

ReadMember = Callable[[str], bytes]
IntArray = npt.NDArray[np.int64]

MAX_BOXES = 500


@dataclass(frozen=True)
class Origin:
    """Where a document came from: data set, shard, its record, and a way to read its members."""

    dataset: str
    shard: str
    record: Record
    read: ReadMember


class DocumentWriter:
    """Turns batches into documents for a page; pictures go to `folder`/media, named by `prefix` and a number."""

    def __init__(self, tokenizer: TextTokenizer, folder: Path, prefix: str) -> None:
        self._tokenizer, self._folder, self._prefix = tokenizer, folder, prefix
        self._special = {getattr(tokenizer.special, f.name) for f in fields(SpecialTokens)}
        self._texts: dict[int, str] = {}
        self._count = 0

    def documents(self, batch: PackedBatch, origins: Sequence[Origin]) -> Iterator[dict[str, Any]]:
        """Each document of `batch`, in order; `origins` [documents] tells what it is made of."""
        media = self._media(batch)
        for number, origin in enumerate(origins):
            start, end = (int(batch.cu_seqlens[number + i]) for i in (0, 1))
            ids = batch.input_ids[start:end].numpy()
            learnt = batch.labels[start:end].numpy() != IGNORE_INDEX
            positions = batch.position_ids[:, start:end].numpy()
            shown = [next(media) for _ in media_refs(origin.record)]
            pieces, runs = self._pieces(ids, learnt, positions, [item["tokens"] for item in shown])
            for item, run in zip(shown, runs, strict=True):
                item |= _positions_of(positions[:, run : run + item["tokens"]], item["grid"]) | {"start": run}
            self._describe_media(shown, origin)
            yield {
                "dataset": origin.dataset,
                "task": origin.record.task,
                "key": origin.record.key,
                "shard": origin.shard,
                "tokens": end - start,
                "supervised": int(learnt.sum()),
                "media": shown,
                "excerpt": _excerpt(origin.record),
                "pieces": pieces,
            }

    def _media(self, batch: PackedBatch) -> Iterator[dict[str, Any]]:
        """The media in document order; the batch holds them in the ViT's order, all stills before all clips."""
        rows = [] if batch.dummy_vision else batch.grid_thw.tolist()
        grids: list[tuple[int, int, int]] = [(t, h, w) for t, h, w in rows]
        pads = {self._tokenizer.special.image_pad: "image", self._tokenizer.special.video_pad: "video"}
        starts = np.flatnonzero(np.isin(batch.input_ids.numpy(), [self._tokenizer.special.vision_start]))
        kinds = [pads[int(batch.input_ids[start + 1])] for start in starts]
        stills = kinds.count("image")
        waiting = {"image": iter(grids[:stills]), "video": iter(grids[stills:])}
        patches_of = {"image": batch.image_patches, "video": batch.video_patches}
        used = {"image": 0, "video": 0}
        for kind in kinds:
            grid = next(waiting[kind])
            size = grid[0] * grid[1] * grid[2]
            patches = patches_of[kind][used[kind] : used[kind] + size]
            used[kind] += size
            yield self._picture(kind, grid, unpatch(patches, grid))

    def _picture(self, kind: str, grid: tuple[int, ...], frames: npt.NDArray[np.uint8]) -> dict[str, Any]:
        name = f"media/{self._prefix}{self._count:04d}.webp"
        self._count += 1
        item: dict[str, Any] = {
            "kind": kind,
            "grid": list(grid),
            "tokens": grid[0] * grid[1] * grid[2] // 4,
            "file": name,
            "seen": [frames.shape[2], frames.shape[1]],
        }
        if kind == "image":
            save_picture(frames[0], self._folder / name)
        else:
            item["strip"] = asdict(save_strip(frames, self._folder / name))
        return item

    def _pieces(
        self, ids: IntArray, learnt: npt.NDArray[np.bool_], positions: IntArray, media_tokens: Sequence[int]
    ) -> tuple[dict[str, Any], list[int]]:
        """The document as pieces of text, most of one token; and where each media item begins.

        kinds: t text, s special token, upper case where supervised; m a media item, all its tokens in one piece.
        """
        pads = {self._tokenizer.special.image_pad, self._tokenizer.special.video_pad}
        texts, tokens, places, kinds, runs = list[str](), list[Any](), list[Any](), list[str](), list[int]()
        sizes = iter(media_tokens)
        at = 0
        while at < len(ids):
            token, text = int(ids[at]), ""
            if token in pads:
                size, kind = next(sizes), "m"
                runs.append(at)
            elif token in self._special:
                size, kind, text = 1, "s", self._text((token,))
            else:
                size, kind = self._whole_characters(ids, at), "t"
                text = self._text(tuple(int(i) for i in ids[at : at + size]))
            texts.append(text)
            tokens.append(token if size == 1 or kind == "m" else [int(i) for i in ids[at : at + size]])
            t, h, w = (int(axis[at]) for axis in positions)
            places.append(t if t == h == w else [t, h, w])
            kinds.append(kind.upper() if learnt[at] else kind)
            at += size
        return {"text": texts, "ids": tokens, "pos": places, "kinds": "".join(kinds)}, runs

    def _text(self, tokens: tuple[int, ...]) -> str:
        if len(tokens) > 1:
            return self._tokenizer.decode(tokens)
        text = self._texts.get(tokens[0])
        if text is None:
            text = self._texts[tokens[0]] = self._tokenizer.decode(tokens)
        return text

    def _whole_characters(self, ids: IntArray, at: int) -> int:
        """How many tokens from `at` make whole characters: byte-level tokens may hold parts of one."""
        for size in range(1, min(6, len(ids) - at) + 1):
            if not self._text(tuple(int(i) for i in ids[at : at + size])).endswith("\ufffd"):
                return size
        return 1

    def _describe_media(self, shown: Sequence[dict[str, Any]], origin: Origin) -> None:
        """Names, source sizes, boxes and the times of frames, from the record."""
        for item, ref in zip(shown, media_refs(origin.record), strict=True):
            facts = origin.record.media[ref.name]
            item |= {"name": ref.name, "width": facts.width, "height": facts.height}
            item["boxes"] = _boxes(origin.record, facts)
            if item["kind"] == "video":
                item |= {"seconds": round(facts.duration_s, 3), "frames": facts.frames, "fps": round(facts.fps, 3)}
                item["times"] = _frame_times(origin.read(ref.name), 2 * item["grid"][0])


def _positions_of(positions: IntArray, grid: Sequence[int]) -> dict[str, Any]:
    """The positions of a media item's tokens, one list an axis: token (k, i, j) has (t[k], h[i], w[j]).

    Positions that do not lie on such a grid would be a defect of this program.
    """
    t, rows, columns = grid[0], grid[1] // 2, grid[2] // 2
    cube = positions.reshape(3, t, rows, columns)
    axes = cube[0, :, 0, 0], cube[1, 0, :, 0], cube[2, 0, 0, :]
    assert (cube == np.stack(np.meshgrid(*axes, indexing="ij"))).all(), f"positions off their grid {grid}"
    return {name: [int(value) for value in axis] for name, axis in zip(("t", "h", "w"), axes, strict=True)}


def _boxes(record: Record, media: Media) -> list[dict[str, Any]]:
    """Boxes and quads on `media`, each once, as the integers the model reads and writes, with their phrase."""
    found = dict.fromkeys(_points(record, media))
    return [{"points": points, "phrase": phrase} for points, phrase in list(found)[:MAX_BOXES]]


def _points(record: Record, media: Media) -> Iterator[tuple[GridPoints, str]]:
    phrase = ""
    for message in record.messages:
        for part in message.parts:
            if not isinstance(part, Region) or part.name != media.name:
                continue
            # An answer of coordinates alone belongs to the phrase asked for before it, and the other way round.
            phrase = part.phrase if part.phrase is not None else phrase
            for box in part.boxes:
                yield box_points(box, media.width, media.height), phrase
            for quad in part.quads:
                yield quad_points(quad, media.width, media.height), phrase


def _frame_times(data: bytes, num_frames: int) -> list[float]:
    """Seconds of the sampled frames after the first: the frames the decoder was asked for, by the same two functions.

    The clip has been decoded a moment ago, under a deadline, so listing its packets here cannot hang. [] if it fails.
    """
    try:
        facts = open_clip(io.BytesIO(data))
    except ClipError:
        return []
    facts.container.close()
    wanted = sample_frame_times(float(facts.times[-1]), num_frames)
    return [round(float(facts.times[number]), 3) for number in nearest_frames(facts.times, wanted)]


def _excerpt(record: Record) -> str:
    """The first words of the last answer, for the sample's card."""
    for message in reversed(record.messages):
        words = " ".join(
            part.text if isinstance(part, Text) else part.phrase or ""
            for part in message.parts
            if isinstance(part, Text | Region)
        ).strip()
        if message.role == "assistant" and words:
            return " ".join(words.split())[:160]
    return ""
