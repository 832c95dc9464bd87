"""Scan a file of JSON lines: where each sample's line lies. Its media lie in files of their own.

Enters: a `ShardFile`. Leaves: one sample a line that is not blank, with a single member "json": offset and size of the
line and its CRC-32, so that a file edited since is noticed. Nothing is parsed here. Costs one pass over the file.

A line ends at a line feed only; the key is FILE/000000 by the number of the line, as an import of the file would say.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

from data_pipelines.config import MAX_RECORD_BYTES
from data_pipelines.errors import ShardError
from data_pipelines.shards.names import changed_since, file_of
from data_pipelines.shards.storage import ShardFile
from data_pipelines.shards.tar import Member, TarSample, TarScan

RECORD = "json"
_READ_BYTES = 4 << 20


def scan_lines(file: ShardFile) -> TarScan:
    """The samples of `file`. No line, one over 64 MiB, a failing disk: problems of the scan, never an exception."""
    stem = os.path.basename(file_of(file.name)).rpartition(".")[0]
    scan = TarScan([], [])
    if file.size == 0:
        scan.problems.append(ShardError(file.name, "no_record", "the file is empty"))
    try:
        for number, (offset, size, crc, blank) in enumerate(_lines(file)):
            key = f"{stem}/{number:06d}"
            if size > MAX_RECORD_BYTES:
                message = f"line {number + 1} has {size} bytes, limit {MAX_RECORD_BYTES}"
                scan.problems.append(ShardError(key, "record_too_big", message))
            elif not blank:
                scan.samples.append(TarSample(key, {RECORD: Member(offset, size, crc)}))
    except ShardError as error:
        scan.problems.append(error)
    return scan


def read_line(key: str, member: Member, file: ShardFile) -> bytes:
    """The bytes of a line.

    Raises:
        ShardError: the file ends before, or the line is not the one that was indexed.
    """
    data = file.read(member.offset, member.size)
    if zlib.crc32(data) != member.crc:
        raise ShardError(key, "shard_changed", changed_since(file.name))
    return data


def _lines(file: ShardFile) -> Iterator[tuple[int, int, int, bool]]:
    """Offset, size, CRC-32 and whether it is blank of every line, its line feed left out. Holds one block at a time."""
    start, crc, blank = 0, 0, True
    for offset in range(0, file.size, _READ_BYTES):
        block = file.read(offset, min(_READ_BYTES, file.size - offset))
        begin = 0
        while (end := block.find(b"\n", begin)) >= 0:
            piece = block[begin:end]
            yield start, offset + end - start, zlib.crc32(piece, crc), blank and not piece.strip()
            start, crc, blank, begin = offset + end + 1, 0, True, end + 1
        crc, blank = zlib.crc32(block[begin:], crc), blank and not block[begin:].strip()
    if start < file.size:
        yield start, file.size - start, crc, blank
