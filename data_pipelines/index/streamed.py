"""The index of a tar that was streamed to its end, from what the stream found out: no record or medium is read again.

Enters: the samples' records as they pass. Leaves: the shard's index, the same bytes that `build` writes. Costs a pass
over the headers and records of a file that was just read, about 20 µs a sample of text, once a shard; until then, the
facts of its samples in memory.

Only a whole shard is kept: a local, uncompressed tar without a problem, each of whose samples gave a record.
"""

from __future__ import annotations

import os
import stat
from contextlib import closing, suppress

from data_pipelines.errors import ShardError
from data_pipelines.index.layout import content_digest
from data_pipelines.index.read import media_refs
from data_pipelines.index.samples import IndexRow, index_columns
from data_pipelines.index.side_files import find_side_file, has_time_of, keep_side_file
from data_pipelines.samples import Media, MediaRef, Record
from data_pipelines.shards.names import is_remote
from data_pipelines.shards.storage import open_shard
from data_pipelines.shards.tar import scan_tar

_Stamp = tuple[int, int, int]


class StreamedFacts:
    """The facts of one shard's samples, gathered in one pass from its beginning; nothing where an index is there."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._facts: dict[str, tuple[str, list[tuple[Media, MediaRef]]]] = {}
        self._stamp = None if is_remote(path) else _stamp_of(path)
        if self._stamp is not None and _has_index(path):
            self._stamp = None

    def add(self, record: Record) -> None:
        """One sample, whose record has the facts of its media."""
        if self._stamp is not None:
            medias = [(record.media[ref.name], ref) for ref in media_refs(record)]
            self._facts[record.key] = (record.task, medias)

    def keep(self) -> None:
        """Write the index, if this was the whole shard and it is still the same file.

        An index is no more than a convenience here: where it cannot be written, the stream goes on without.
        """
        facts, self._facts = self._facts, {}
        if self._stamp is None or _stamp_of(self._path) != self._stamp:
            return
        with suppress(ShardError, OSError), closing(open_shard(self._path)) as file:
            scan = scan_tar(file)
            if scan.problems or [sample.key for sample in scan.samples] != list(facts):
                return  # what was lost is for `build` to tell, with all that it says of it
            rows = []
            for sample in scan.samples:
                task, medias = facts[sample.key]
                rows.append(IndexRow(sample.key, task, sample.members, medias))
            arrays, meta = index_columns(rows)
            told = {"content": content_digest(scan, file), "problems": [], "unlisted": {}}
            keep_side_file(file, "index", {}, (arrays, {**meta, **told}))


def _stamp_of(path: str) -> _Stamp | None:
    """What tells a regular file from another under its name; None: there is none."""
    with suppress(OSError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _has_index(path: str) -> bool:
    with suppress(ShardError, OSError), closing(open_shard(path)) as file:
        held = find_side_file(file, "index", {})
        return held is not None and has_time_of(held, file)
    return False
