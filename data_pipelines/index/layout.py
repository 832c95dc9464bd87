"""Tars and files of JSON lines, told apart here alone: what is in a shard, and how one of its samples is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from data_pipelines.config import MAX_RECORD_BYTES
from data_pipelines.decode.members import extension
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.errors import ShardError
from data_pipelines.index.lines import measure_line, read_sample_line
from data_pipelines.index.read import TEXT_EXTENSIONS, probe_media, read_member, read_record, with_media
from data_pipelines.samples import Media, Record
from data_pipelines.shards.lines import scan_lines
from data_pipelines.shards.names import is_lines
from data_pipelines.shards.storage import ShardFile
from data_pipelines.shards.tar import Member, TarScan, scan_tar


def scan_shard(file: ShardFile) -> TarScan:
    """The samples and problems of a shard; damage is a problem of the scan, never an exception."""
    return scan_lines(file) if is_lines(file.name) else scan_tar(file)


def content_digest(scan: TarScan, file: ShardFile) -> str:
    """16 hex digits of all that an index goes by: keys, places, headers and records, not the bytes of media.

    Costs 2 µs a member and a read of each record: the scan itself costs more.
    """
    digest = hashlib.blake2b(digest_size=8)
    for sample in scan.samples:
        digest.update(f"{sample.key}\n".encode("utf-8", "backslashreplace"))
        for name, member in sample.members.items():
            digest.update(f"{name} {member.offset} {member.size} {member.crc}\n".encode("utf-8", "backslashreplace"))
            # The CRC of a line is of its text, that of a tar's member of its header.
            if extension(name) in TEXT_EXTENSIONS and not is_lines(file.name):
                digest.update(_text_of(member, file))
    for problem in scan.problems:
        digest.update(f"{problem.reason}\n".encode())
    return digest.hexdigest()


def _text_of(member: Member, file: ShardFile) -> bytes:
    """A record's bytes; of one that is too large or cannot be read, nothing: its sample is not indexed."""
    if member.size > MAX_RECORD_BYTES:
        return b""
    try:
        return file.read(member.offset, member.size)
    except ShardError:
        return b""


def measure_sample(key: str, members: Mapping[str, Member], file: ShardFile, clips: ClipDecoder) -> Record:
    """A sample's record with the facts of all its media, from the media where the record does not state them.

    Raises:
        RecordError, MediaError, ShardError: with the sample's key.
    """
    if is_lines(file.name):
        return measure_line(key, members, file, clips)
    record = read_record(key, members, file)
    return with_media(record, probe_media(record, members, file, clips))


def read_sample(
    key: str, members: Mapping[str, Member], file: ShardFile, facts: Mapping[str, Media]
) -> tuple[Record, Callable[[str], bytes]]:
    """A sample's record, whose media have the indexed `facts`, and a function that reads a media member by name.

    Raises:
        RecordError, MediaError, ShardError: with the sample's key.
    """
    if is_lines(file.name):
        return read_sample_line(key, members, file, facts)
    record = with_media(read_record(key, members, file), facts)
    return record, lambda name: read_member(key, name, members[name], file)
