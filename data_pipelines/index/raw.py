"""Every sample's bytes as they are stored, in the order of the shards: for programs that decode on their own.

Enters: shards, through their indices (built on first need). Leaves: keys and members. A local tar is mapped, and its
members are views of the page cache: nothing is copied, about 1 us a sample. Members behind URLs, and lines of JSON, are
read.

A mapped file that is cut under its reader ends the process (SIGBUS); training reads with `pread`, which raises instead.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator, Sequence

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import MediaError, ShardError
from data_pipelines.index.build import load_index
from data_pipelines.index.read import read_member
from data_pipelines.index.samples import ShardIndex
from data_pipelines.shards.lines import read_line
from data_pipelines.shards.names import changed_since, file_of, is_lines, is_remote
from data_pipelines.shards.storage import REMOTE_DEFAULTS, expand_shards, open_shard
from data_pipelines.shards.tar import BLOCK, Member

RawMembers = dict[str, memoryview]


def raw_samples(patterns: Sequence[str], remote: RemoteConfig = REMOTE_DEFAULTS) -> Iterator[tuple[str, RawMembers]]:
    """(key, {"json": ..., "0.jpg": ...}) of every sample that the shards' indices list; `bytes(view)` copies a member.

    `patterns` name shards as a source's `shards` do. A view keeps its shard mapped, also after the file was deleted.

    Raises:
        ShardError: no shard, or one that cannot be read. MediaError: "shard_changed", where a member's header is not
            the one that was indexed.
    """
    for shard in expand_shards("", patterns, remote):
        index = load_index(shard, remote)
        if is_remote(shard) or is_lines(shard):
            yield from _read_each(shard, index, remote)
        elif index.num_samples:
            yield from _view_each(shard, index)


def _view_each(shard: str, index: ShardIndex) -> Iterator[tuple[str, RawMembers]]:
    mapped, time_ns = _map(shard)
    data, crc32 = memoryview(mapped), zlib.crc32
    if len(data) != index.columns.meta["size"]:
        raise ShardError(shard, "shard_changed", changed_since(shard))
    # Of the very file that was indexed the headers need no look: a third of the time, for pictures most of it.
    unchanged = index.columns.meta.get("time_ns") == time_ns
    for key, spans in index.spans():
        members = {}
        for name, offset, size, crc in spans:
            if not unchanged and crc32(data[offset - BLOCK : offset]) != crc:
                raise MediaError(key, "shard_changed", f"{name}: {changed_since(shard)}")
            members[name] = data[offset : offset + size]
        yield key, members


def _map(shard: str) -> tuple[mmap.mmap, int]:
    """The shard's bytes, and the time of its last change."""
    try:
        with open(file_of(shard), "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise ShardError(shard, "unreadable_shard", f"cannot be mapped: {error}") from error


def _read_each(shard: str, index: ShardIndex, remote: RemoteConfig) -> Iterator[tuple[str, RawMembers]]:
    file = open_shard(shard, remote)
    try:
        for key, spans in index.spans():
            listed = [(name, Member(offset, size, crc)) for name, offset, size, crc in spans]
            if is_lines(shard):
                yield key, {name: memoryview(read_line(key, member, file)) for name, member in listed}
            else:
                yield key, {name: memoryview(read_member(key, name, member, file)) for name, member in listed}
    finally:
        file.close()
