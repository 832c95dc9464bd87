"""One streamed sample in the form of a shard, so that records and members are read by the code that reads tars.

Enters: a sample's members in memory. Leaves: a `ShardFile` and its `Member`s. Costs one copy of each member
that is read.
"""

from __future__ import annotations

import hashlib
import zlib

from data_pipelines.errors import ShardError
from data_pipelines.shards.stream import RawSample
from data_pipelines.shards.tar import BLOCK, Member

_HEADER = bytes(BLOCK)
_HEADER_CRC = zlib.crc32(_HEADER)


class SampleFile:
    """The members of `sample` behind one another, each after an empty header; `members` says where."""

    def __init__(self, sample: RawSample) -> None:
        self.name = sample.key
        self.size = self.time_ns = 0
        self.shares_name = False
        self.members: dict[str, Member] = {}
        self._data: dict[int, bytes] = {}
        for suffix, data in sample.members.items():
            self._data[self.size] = data
            self.members[suffix] = Member(self.size + BLOCK, len(data), _HEADER_CRC)
            self.size += BLOCK + len(data)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`, a member's header."""
        data = _HEADER + self._data.get(offset, b"")
        if len(data) < size:
            raise ShardError(self.name, "cut_shard", f"{size} bytes wanted at {offset}, {len(data)} there")
        return data[:size]

    def tag(self) -> str:
        """A hash of the content."""
        digest = hashlib.blake2b(digest_size=8)
        for data in self._data.values():
            digest.update(data)
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is open."""
