"""A source of the mixture: its shards in order, each opened through its index when it is needed.

Enters: shard paths and what counts their text. Leaves: samples by (shard number, row), their counts without reading
them, their records and members by reading. Costs nothing for shards that nobody asks for; open tables are memory maps.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.index.build import Counting, is_as_indexed, load_index, load_text_tokens
from data_pipelines.index.layout import read_sample
from data_pipelines.index.roll import Counts, Roll
from data_pipelines.index.samples import ShardIndex
from data_pipelines.index.table import Array
from data_pipelines.samples import Media, MediaRef, Record
from data_pipelines.shards.names import changed_since, file_of, is_remote, public_name
from data_pipelines.shards.storage import REMOTE_DEFAULTS, OpenShards, fetch_ranges
from data_pipelines.shards.tar import BLOCK

ReadMember = Callable[[str], bytes]
MAX_OPEN_TABLES = 64


@dataclass(frozen=True, slots=True)
class ShardTable:
    """One shard's samples: `index`, `text_tokens` int32 [n] (-1: not usable), `problems` and `unlisted` of both.

    `truncatable` uint8 [n] is 1 where a text may be shortened at its end to fit a pack.
    """

    index: ShardIndex
    text_tokens: Array
    truncatable: Array
    problems: tuple[tuple[str, str, str], ...]
    unlisted: Counter[str]

    def counts(self) -> Counts:
        """Its samples, counted."""
        left_out = Counter(reason for _, reason, _ in self.problems) + self.unlisted
        return Counts(self.index.num_samples, int((self.text_tokens >= 0).sum()), left_out, (self.index.mark,))


class SourceIndex:
    """The samples of one source. `shards` is the sorted list of paths; a sample is (shard number, row).

    It pickles without its open files and maps, so every worker opens its own.
    """

    def __init__(
        self, name: str, shards: Sequence[str], counting: Counting, remote: RemoteConfig = REMOTE_DEFAULTS
    ) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.counting = counting
        self.remote = remote
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()
        self._files = OpenShards(remote=remote)
        self._counts: Counts | None = None
        self._as_indexed: dict[int, bool] = {}

    def __reduce__(self) -> tuple[type[SourceIndex], tuple[str, tuple[str, ...], Counting, RemoteConfig]]:
        return SourceIndex, (self.name, self.shards, self.counting, self.remote)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shards)

    @property
    def num_samples(self) -> int:
        """Samples of all shards, whether or not they fit a pack."""
        return self.counts().num_samples

    def counts(self) -> Counts:
        """What all shards hold. Opens the indices of those that are not on their folder's roll, and puts them there.

        Raises:
            ShardError: a shard cannot be read.
        """
        if self._counts is None:
            roll = Roll(self.shards, self.counting.name, self.remote)
            missing = [number for number, shard in enumerate(self.shards) if shard not in roll.known]
            counted = {self.shards[number]: self.table(number).counts() for number in missing}
            roll.add(counted)
            self._counts = Counts.sum((roll.known.get(shard) or counted[shard]) for shard in self.shards)
        return self._counts

    @cached_property
    def fingerprint(self) -> str:
        """Which shards in which order, by file name and content: a data set that was moved stays the same.

        Raises:
            ShardError: a shard cannot be read.
        """
        marks = self.counts().marks
        shards = [f"{_base_name(shard)} {mark}" for shard, mark in zip(self.shards, marks, strict=True)]
        return hashlib.blake2b("\n".join(shards).encode(), digest_size=8).hexdigest()

    def table(self, shard: int) -> ShardTable:
        """The columns of one shard, built on first need.

        Raises:
            ShardError: the shard cannot be read.
        """
        table = self._tables.get(shard)
        if table is None:
            path = self.shards[shard]
            index = load_index(path, self.remote)
            text = load_text_tokens(path, index, self.counting, self.remote)
            listed = [*index.problems, *(tuple(problem) for problem in text.meta["problems"])]
            unlisted = Counter(index.unlisted) + Counter(text.meta["unlisted"])
            table = self._tables[shard] = ShardTable(
                index, text.arrays["tokens"], text.arrays["truncatable"], tuple(listed), unlisted
            )
            if len(self._tables) > MAX_OPEN_TABLES:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(shard)
        return table

    def key(self, shard: int, row: int) -> str:
        """The key of a sample."""
        return self.table(shard).index.key(row)

    def media(self, shard: int, row: int) -> tuple[tuple[Media, MediaRef], ...]:
        """Facts and per-part limits of a sample's media, in document order."""
        return self.table(shard).index.media(row)

    def read(self, shard: int, row: int) -> tuple[Record, ReadMember]:
        """A sample's record, with the facts of its media, and a function that reads a media member by name.

        Raises:
            RecordError, MediaError, ShardError: with the sample's key.
        """
        index = self.table(shard).index
        file = self._files.get(self.shards[shard])
        key, members = index.key(row), index.members(row)
        return read_sample(key, members, file, {media.name: media for media, _ in index.media(row)})

    def records(self) -> Iterator[tuple[str, Record, tuple[tuple[Media, MediaRef], ...], ReadMember]]:
        """Every usable sample in shard and tar order: (key, record, media in document order, member reader)."""
        for shard in range(self.num_shards):
            table = self.table(shard)
            for row in range(table.index.num_samples):
                if table.text_tokens[row] >= 0:
                    record, reader = self.read(shard, row)
                    yield record.key, record, table.index.media(row), reader

    def prefetch(self, samples: Iterable[tuple[int, int]], progress: Callable[[], None]) -> None:
        """Bring the (shard, row) samples of remote shards into the cache, side by side; local ones cost nothing.

        `progress` is called, from several threads, as bytes come.
        """
        ranges = []
        for shard, row in samples:
            if is_remote(self.shards[shard]):
                with suppress(ShardError):  # told when the sample is read
                    members = self.table(shard).index.members(row).values()
                    start = max(0, min(member.offset for member in members) - BLOCK)  # a line has no header before it
                    end = max(member.offset + member.size for member in members)
                    ranges.append((self._files.get(self.shards[shard]), start, end - start))
        if ranges:
            fetch_ranges(ranges, self.remote, progress)

    def mismatch(self, shard: int) -> tuple[str, str]:
        """Reason and cause where a sample's encoding is not as planned: the shard was changed, else a defect."""
        path = self.shards[shard]
        if is_remote(path):
            return "plan_mismatch", f"a defect of this program, unless {changed_since(path)}"
        if shard not in self._as_indexed:
            self._as_indexed[shard] = is_as_indexed(self._files.get(path), self.table(shard).index)
        if self._as_indexed[shard]:
            return "plan_mismatch", "defect of this program"
        return "shard_changed", changed_since(path)

    def close(self) -> None:
        """Close the shards and forget the tables; both open again when needed."""
        self._files.close()
        self._tables.clear()


def _base_name(shard: str) -> str:
    return os.path.basename(file_of(public_name(shard)))
