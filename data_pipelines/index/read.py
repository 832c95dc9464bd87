"""From a shard's bytes to one sample: its record, its members, the facts of its media.

Used alike when the index is built and when a worker reads a sample, so that both see the same record. Enters: an open
shard and members with offsets. Leaves: a `Record` with the facts of all its media, or an error with the key. Costs one
`pread` a member; media are opened only where the record does not state their dimensions.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

from data_pipelines.config import MAX_MEDIA_BYTES, MAX_RECORD_BYTES
from data_pipelines.decode.image import probe_image
from data_pipelines.decode.members import extension
from data_pipelines.decode.record import parse_record
from data_pipelines.decode.regions import check_bounds
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.errors import MediaError, RecordError
from data_pipelines.samples import Media, MediaRef, Record
from data_pipelines.shards.names import changed_since
from data_pipelines.shards.storage import ShardFile
from data_pipelines.shards.tar import BLOCK, Member

TEXT_EXTENSIONS = ("json", "txt")


def read_member(key: str, name: str, member: Member, file: ShardFile) -> bytes:
    """A member's bytes. Its tar header is compared with the indexed one: a shard replaced since must not pass.

    Raises:
        MediaError: another header, or more than 1 GiB. ShardError: the file ends before.
    """
    if member.size > MAX_MEDIA_BYTES:
        raise MediaError(key, "media_too_big", f"{name} has {member.size} bytes, limit {MAX_MEDIA_BYTES}")
    data = file.read(member.offset - BLOCK, member.size + BLOCK)
    if zlib.crc32(data[:BLOCK]) != member.crc:
        raise MediaError(key, "shard_changed", f"{name}: {changed_since(file.name)}")
    return data[BLOCK:]


def read_record(key: str, members: Mapping[str, Member], file: ShardFile) -> Record:
    """Read and parse a sample's record; its media are not read.

    Raises:
        RecordError, MediaError, ShardError: with the sample's key.
    """
    texts: dict[str, bytes | None] = dict.fromkeys(members)
    for name, member in members.items():
        if extension(name) in TEXT_EXTENSIONS:
            if member.size > MAX_RECORD_BYTES:
                raise RecordError(key, "record_too_big", f"{name} has {member.size} bytes, limit {MAX_RECORD_BYTES}")
            texts[name] = read_member(key, name, member, file)
    # A key with a dot ("picture.0001.json") leaves "0001.json" as the suffix: the only JSON there is the record.
    dotted = [name for name in texts if extension(name) == "json"]
    if "json" not in texts and len(dotted) == 1:
        texts["json"] = texts.pop(dotted[0])
    return parse_record(key, texts)


def media_refs(record: Record) -> tuple[MediaRef, ...]:
    """The media of a record in document order; a member shown twice appears twice."""
    return tuple(part for message in record.messages for part in message.parts if isinstance(part, MediaRef))


def with_media(record: Record, media: Mapping[str, Media]) -> Record:
    """The record with the facts of its media, its boxes and quads checked against their sizes.

    Raises:
        RecordError: a box outside its picture.
    """
    if record.media == media:  # checked against these already, when it was parsed
        return record
    return check_bounds(replace(record, media=dict(media)), media)


def probe_media(record: Record, members: Mapping[str, Member], file: ShardFile, clips: ClipDecoder) -> dict[str, Media]:
    """The facts of every media member of `record`: from its JSON where complete, else from the member's header.

    Clips are opened by `clips`, in a process of their own and under its deadline: decoders hang on damaged headers.

    Raises:
        MediaError: an empty member or one whose header cannot be read.
    """
    facts: dict[str, Media] = {}
    for ref in media_refs(record):
        if ref.name in facts:
            continue
        member = members[ref.name]
        if member.size == 0:
            raise MediaError(record.key, "empty_media", f"{ref.name} has no bytes")
        stated = record.media.get(ref.name)
        if stated is None or (stated.kind == "video" and not (stated.duration_s or stated.fps)):
            data = read_member(record.key, ref.name, member, file)
            probe = clips.probe if ref.kind == "video" else probe_image
            stated = probe(data, ref.name, record.key)
        facts[ref.name] = stated
    return facts
