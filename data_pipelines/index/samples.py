"""One shard's samples as columns: where their bytes lie, what their media measure, how many text tokens they have.

Two side files a shard. The *index* depends on the shard alone: raw dimensions, so that another pixel budget or pack
length needs no new one. The *text column* depends on tokenizer and template too.

Legend: n usable samples, m members, k media items in document order (a member shown twice is two items).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.index.table import Array, Columns, text_column
from data_pipelines.samples import Media, MediaRef
from data_pipelines.shards.tar import Member

FORMAT = 3
KINDS = ("image", "video")


@dataclass(slots=True)
class IndexRow:
    """What the index keeps of one sample: its members by suffix and its media in document order."""

    key: str
    task: str
    members: dict[str, Member]
    media: list[tuple[Media, MediaRef]]


class ShardIndex:
    """The samples of one shard, read from its mapped index. Row numbers count usable samples in tar order.

    Attributes: `num_samples` n; `problems` [(key, reason, message)] of what was left out and why; `unlisted` counts by
    reason those beyond the list.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.arrays = columns.arrays
        self.num_samples: int = columns.meta["num_samples"]
        self.problems: list[tuple[str, str, str]] = [tuple(problem) for problem in columns.meta["problems"]]
        self.unlisted: dict[str, int] = columns.meta["unlisted"]
        self._names: list[str] = columns.meta["names"]
        self._tasks: list[str] = columns.meta["tasks"]

    @property
    def fingerprint(self) -> str:
        """Of the samples in their rows, their records, headers and media facts: a text column belongs to one."""
        meta = self.columns.meta
        return f"{meta['rows']}-{meta['content']}"

    @property
    def mark(self) -> str:
        """By which a plan knows the shard again: its size and the fingerprint."""
        return f"{self.columns.meta['size']}-{self.fingerprint}"

    def key(self, row: int) -> str:
        """The sample's key in its shard."""
        return self.columns.text("key", row)

    def task_name(self, number: int) -> str:
        """The kind of sample ("caption", "chat", ...) that the column `task` holds as `number`."""
        return self._tasks[number]

    def members(self, row: int) -> dict[str, Member]:
        """Offsets and sizes of the sample's members by suffix."""
        a = self.arrays
        first, end = _span(a["member_ends"], row)
        return {
            self._names[int(a["member_name"][i])]: Member(
                int(a["member_offset"][i]), int(a["member_size"][i]), int(a["member_crc"][i])
            )
            for i in range(first, end)
        }

    def spans(self) -> Iterator[tuple[str, list[tuple[str, int, int, int]]]]:
        """Every sample's key and members in row order, a member as (suffix, offset, size, CRC-32 of its header).

        For passes over the whole shard: 0.5 us a sample, where `key` and `members` take 3.
        """
        a = self.arrays
        names = [self._names[number] for number in a["member_name"].tolist()]
        columns = (a[column].tolist() for column in ("member_offset", "member_size", "member_crc"))
        members = list(zip(names, *columns, strict=True))
        keys, key_start, start = a["key_bytes"].tobytes(), 0, 0
        for key_end, end in zip(a["key_ends"].tolist(), a["member_ends"].tolist(), strict=True):
            yield keys[key_start:key_end].decode("utf-8"), members[start:end]
            key_start, start = key_end, end

    def media(self, row: int) -> tuple[tuple[Media, MediaRef], ...]:
        """Facts and per-part limits of the sample's media, in document order."""
        a = self.arrays
        first, end = _span(a["media_ends"], row)
        return tuple(self._media_item(i) for i in range(first, end))

    def _media_item(self, i: int) -> tuple[Media, MediaRef]:
        a = self.arrays
        kind = KINDS[int(a["media_kind"][i])]
        name = self._names[int(a["media_name"][i])]
        media = Media(
            name,
            "video" if kind == "video" else "image",
            int(a["media_width"][i]),
            int(a["media_height"][i]),
            int(a["media_frames"][i]),
            float(a["media_fps"][i]),
            float(a["media_duration"][i]),
        )
        fps = float(a["part_fps"][i])
        ref = MediaRef(
            name,
            _optional(a["part_min_pixels"][i]),
            _optional(a["part_max_pixels"][i]),
            None if math.isnan(fps) else fps,
            _optional(a["part_nframes"][i]),
            media.kind,
        )
        return media, ref


def index_columns(rows: Sequence[IndexRow]) -> tuple[dict[str, Array], dict[str, Any]]:
    """The arrays of an index and the parts of its description that belong to them."""
    names = _Numbering()
    tasks = _Numbering()
    members = [(names[name], member) for row in rows for name, member in row.members.items()]
    media = [item for row in rows for item in row.media]
    arrays: dict[str, Array] = {
        **text_column("key", [row.key for row in rows]),
        "task": np.array([tasks[row.task] for row in rows], np.uint32),
        "member_ends": np.cumsum([len(row.members) for row in rows], dtype=np.uint64),
        "member_name": np.array([name for name, _ in members], np.uint32),
        "member_offset": np.array([member.offset for _, member in members], np.uint64),
        "member_size": np.array([member.size for _, member in members], np.uint64),
        "member_crc": np.array([member.crc for _, member in members], np.uint32),
        "media_ends": np.cumsum([len(row.media) for row in rows], dtype=np.uint64),
        "media_name": np.array([names[fact.name] for fact, _ in media], np.uint32),
        "media_kind": np.array([KINDS.index(fact.kind) for fact, _ in media], np.uint8),
        "media_width": np.array([fact.width for fact, _ in media], np.uint32),
        "media_height": np.array([fact.height for fact, _ in media], np.uint32),
        "media_frames": np.array([fact.frames for fact, _ in media], np.uint32),
        "media_fps": np.array([fact.fps for fact, _ in media], np.float64),
        "media_duration": np.array([fact.duration_s for fact, _ in media], np.float64),
        "part_min_pixels": np.array([_stored(ref.min_pixels) for _, ref in media], np.int64),
        "part_max_pixels": np.array([_stored(ref.max_pixels) for _, ref in media], np.int64),
        "part_fps": np.array([math.nan if ref.fps is None else ref.fps for _, ref in media], np.float64),
        "part_nframes": np.array([_stored(ref.nframes) for _, ref in media], np.int64),
    }
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays.values():
        digest.update(array.tobytes())
    meta = {"num_samples": len(rows), "rows": digest.hexdigest(), "names": names.listed, "tasks": tasks.listed}
    return arrays, meta


class _Numbering(dict[str, int]):
    """Strings numbered in order of first use."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]

    @property
    def listed(self) -> list[str]:
        return list(self)


def _span(ends: Array, row: int) -> tuple[int, int]:
    return (int(ends[row - 1]) if row else 0), int(ends[row])


def _stored(value: int | None) -> int:
    return -1 if value is None else value


def _optional(value: Any) -> int | None:
    return None if value < 0 else int(value)
