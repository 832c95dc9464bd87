"""From a line of JSON to one sample: its record, and its media in files of their own.

The counterpart of `index.read` for files of JSON lines. Enters: an open file of lines and a line's place. Leaves: a
`Record` whose media are called "0.jpg", "1.mp4", ... as in a tar. Costs the parsing of the line (about 0.1 ms) and,
when the index is built, one header for each picture, one opening for each clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from data_pipelines.decode.fields import load_json, mapping
from data_pipelines.decode.image import image_orientation, probe_image
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.decode.written_record import WrittenRecord, finish_record, read_written
from data_pipelines.errors import MediaError
from data_pipelines.samples import Media, Record
from data_pipelines.shards.lines import RECORD, read_line
from data_pipelines.shards.media_files import read_media_file
from data_pipelines.shards.names import media_root
from data_pipelines.shards.storage import ShardFile
from data_pipelines.shards.tar import Member


def measure_line(key: str, members: Mapping[str, Member], file: ShardFile, clips: ClipDecoder) -> Record:
    """The record of a line, with the facts of its media read from the media themselves.

    Raises:
        RecordError, MediaError, ShardError: with the sample's key.
    """
    written, root = _read(key, members, file), Path(media_root(file.name))
    facts = {}
    for (kind, _), (member, name) in zip(written.media, written.members.items(), strict=True):
        data = _media(key, name, root)
        if kind == "video":
            facts[member] = clips.probe(data, member, key)
            continue
        facts[member] = probe_image(data, member, key)
        if written.has_pixels and written.size is None and image_orientation(data, key) != 1:
            message = f"{name} is turned by EXIF: were its boxes drawn before or after? Declare width and height"
            raise MediaError(key, "turned_picture", f"{message} as displayed in the line, or import the file")
    return finish_record(written, facts)


def read_sample_line(
    key: str, members: Mapping[str, Member], file: ShardFile, facts: Mapping[str, Media]
) -> tuple[Record, Callable[[str], bytes]]:
    """The record of a line, whose media have the indexed `facts`, and a function that reads a medium by member name.

    Raises:
        RecordError, MediaError, ShardError: with the sample's key.
    """
    written, root = _read(key, members, file), Path(media_root(file.name))
    names = written.members
    return finish_record(written, facts), lambda member: read_media_file(names[member], root, key)


def _read(key: str, members: Mapping[str, Member], file: ShardFile) -> WrittenRecord:
    line = read_line(key, members[RECORD], file)
    return read_written(key, mapping(key, "record", load_json(key, line)))


def _media(key: str, name: str, root: Path) -> bytes:
    try:
        return read_media_file(name, root, key)
    except MediaError as error:
        if error.reason != "missing_media":
            raise
        message = f"{error.message}: looked for in {root}; once it is there, delete the index beside the file"
        raise MediaError(key, error.reason, message) from error
