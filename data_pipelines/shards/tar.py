"""Scan a webdataset tar: which samples it holds and where their bytes lie. Nothing is extracted, no name is a path.

Enters: a `ShardFile`. Leaves: samples (members that share a key) with offsets, and the list of what is wrong with the
shard. Costs one read a member (512 bytes of header), none of the data.

Checked: every header's checksum, that members end inside the file, the end marker, data after it, repeated keys. Keys
whose members do not stand together are joined, and noted: readers that stream the tar split or drop such samples.
A damaged shard gives the whole samples before the damage and a problem that says where it ends: the reading of a tar
cannot go on behind a header that is wrong. The webdataset package ends such a shard silently.

Key and suffix follow webdataset: the base name is split at its first dot, the key keeps the folder ("a/b.0.jpg" → key
"a/b", suffix "0.jpg", lower case). Names whose base begins with a dot (macOS junk) and `__meta__` are no samples. A
leading "/" or "./" is left out, as tar does. Names with ".." are refused: an import makes new members' names of keys.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipelines.errors import ShardError
from data_pipelines.shards.storage import ShardFile

BLOCK = 512
MAX_EXTENDED_HEADER = 1 << 20
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
REGULAR = b"0\0007"
_OTHER = {ord("1"): "hard link", ord("2"): "symbolic link", ord("3"): "device", ord("4"): "device", ord("6"): "pipe"}
_ZEROS = bytes(BLOCK)
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a shard: `size` bytes of data from `offset`; `crc` is the CRC-32 of its 512-byte header."""

    offset: int
    size: int
    crc: int


@dataclass(slots=True)
class TarSample:
    """The members that share a key, by suffix ("json", "0.jpg")."""

    key: str
    members: dict[str, Member]


@dataclass(slots=True)
class TarScan:
    """What a shard holds: its whole samples in order, and its problems (each names the shard or key and a reason)."""

    samples: list[TarSample]
    problems: list[ShardError]


@dataclass(frozen=True, slots=True)
class Header:
    """What a header block states: the member's name, size in bytes, type flag; `crc` is the CRC-32 of the block."""

    name: str
    size: int
    kind: int
    crc: int


def scan_tar(file: ShardFile) -> TarScan:
    """The samples and problems of `file`. Damage is a problem of the returned scan, never an exception."""
    groups: dict[str, dict[str, Member]] = {}
    repeated, scattered = dict[str, int](), dict[str, int]()
    problems: list[ShardError] = []
    last_key = ""
    try:
        for header, offset in _members(file, problems):
            named = key_and_suffix(header, file.name, problems)
            if named is None:
                continue
            key, suffix = named
            if offset + header.size > file.size:
                groups.pop(key, None)
                raise ShardError(
                    file.name,
                    "cut_shard",
                    f"member {header.name!r} at {offset} claims {header.size} bytes, the file has {file.size}",
                )
            if key in groups and key != last_key:
                scattered[key] = offset
            members = groups.setdefault(key, {})
            if suffix in members:
                repeated[key] = offset
            members[suffix] = Member(offset, header.size, header.crc)
            last_key = key
    except ShardError as error:
        if error.reason == "bad_header":
            _drop_unfinished(groups, last_key)
        problems.append(
            ShardError(file.name, error.reason, f"{error.message}; {len(groups)} samples before it are used")
        )
    for key, offset in repeated.items():
        del groups[key]
        problems.append(
            ShardError(
                f"{file.name}/{key}", "duplicate_key", f"key repeated at {offset}: which is meant is unknown, dropped"
            )
        )
    for key, offset in scattered.items():
        if key in groups:
            message = f"its members do not stand together (more at {offset}): joined here, lost by readers that stream"
            problems.append(ShardError(f"{file.name}/{key}", "scattered_key", message))
    return TarScan([TarSample(key, members) for key, members in groups.items()], problems)


def _members(file: ShardFile, problems: list[ShardError]) -> Iterator[tuple[Header, int]]:
    """Every member's header, with long names resolved, and the offset of its data."""
    if file.size == 0:
        raise ShardError(file.name, "bad_header", "the file is empty")
    if file.size < BLOCK and (foreign := _foreign_content(file.read(0, file.size))):
        raise ShardError(file.name, "bad_header", foreign)
    offset, overrides = 0, dict[str, str]()
    while offset + BLOCK <= file.size:
        block = file.read(offset, BLOCK)
        if block == _ZEROS:
            _check_end(file, offset, problems)
            return
        header = parse_header(block, file.name, offset)
        data, offset = offset + BLOCK, offset + BLOCK + -(-header.size // BLOCK) * BLOCK
        if header.kind in b"xgLK":
            extended = _extended(file, header, data)
            overrides.update(extended if header.kind != ord("g") else {})
            continue
        if "size" in overrides:
            header = Header(header.name, decimal(overrides["size"], file.name, data), header.kind, header.crc)
            offset = data + -(-header.size // BLOCK) * BLOCK
        yield Header(overrides.get("path", header.name), header.size, header.kind, header.crc), data
        overrides = {}
    if offset != file.size:
        raise ShardError(file.name, "cut_shard", f"the file ends inside a header, at byte {file.size}: copy it again")
    problems.append(
        ShardError(file.name, "no_end_marker", "no two zero blocks at the end; the members up to here are whole")
    )


def parse_header(block: bytes, name: str, offset: int) -> Header:
    """One header block (POSIX ustar or GNU) of the shard `name`.

    Raises:
        ShardError: "bad_header": its checksum is wrong.
    """
    try:
        stored = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        stored = size = -1
    # The checksum field counts as eight spaces; some old writers summed signed bytes.
    summed = block[:148] + block[156:]
    unsigned = sum(summed) + 256
    if size < 0 or (stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in summed)):
        foreign = None if offset else _foreign_content(block)
        message = f"no tar header at byte {offset} (wrong checksum; it begins with {block[:16]!r})"
        raise ShardError(name, "bad_header", foreign or message)
    text = _text(block[0:100])
    if block[257:263] == b"ustar\0" and block[345]:
        text = f"{_text(block[345:500])}/{text}"
    return Header(text, size, block[156], zlib.crc32(block))


def _foreign_content(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of a tar, where that is plain, and what to do."""
    for magic, (form, tool) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"compressed with {form}: decompress it ({tool}), a compressed shard has no random access"
    if head.lstrip()[:1] == b"<":
        return f"no tar: it begins with {head[:24]!r}, so a page was saved in its place; fetch it again"
    return None


def _extended(file: ShardFile, header: Header, offset: int) -> dict[str, str]:
    """What a pax ("x") or GNU long-name ("L") header says of the member after it."""
    if header.size > MAX_EXTENDED_HEADER or offset + header.size > file.size:
        raise ShardError(file.name, "bad_header", f"extended header at {offset} claims {header.size} bytes")
    return parse_extended(header, file.read(offset, header.size), file.name, offset)


def parse_extended(header: Header, data: bytes, shard: str, offset: int) -> dict[str, str]:
    """The content of an extended header, which overrides fields of the member after it ("path", "size").

    Raises:
        ShardError: "bad_header": it does not parse.
    """
    if header.kind == ord("L"):
        return {"path": _text(data)}
    if header.kind == ord("K"):
        return {}
    fields = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(data):
            raise ShardError(shard, "bad_header", f"pax header at {offset} does not parse")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[_text(key)] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return fields


def key_and_suffix(header: Header, shard: str, problems: list[ShardError]) -> tuple[str, str] | None:
    """(key, suffix) of a regular member; None for what belongs to no sample. Members that a sample loses are reported.

    Once a sample where they stand together; folders, and links and devices by other names than a sample's, are junk.
    """
    name = member_name(header.name)
    named = split_name(name)
    if named is None or header.kind == ord("5"):
        return None
    if header.kind not in REGULAR:
        what = _OTHER.get(header.kind, f"type {header.kind:#x}")
        reason = "not_a_file"
        message = f"member {header.name!r} is a {what}, without content; write the tar with --dereference"
        if header.kind == ord("1"):
            message += " --hard-dereference"
    elif ".." in name.split("/"):
        reason, message = "unsafe_name", f"member {header.name!r} points outside: left out; write the tar without '..'"
    else:
        return named
    key = f"{shard}/{named[0]}"
    if not problems or (problems[-1].key, problems[-1].reason) != (key, reason):
        problems.append(ShardError(key, reason, message))
    return None


def member_name(name: str) -> str:
    """A member's name without what leads to the root or here: "/a/b.jpg" and "./a/b.jpg" are "a/b.jpg"."""
    return name.removeprefix("./").lstrip("/")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member's name; None for names that belong to no sample.

    Suffixes that begin with "__" are none: the package keeps facts of its own under such names ("__key__").
    """
    match = _NAME.match(member_name(name))
    if match is None or _META.match(name) or match[2].startswith("__"):
        return None
    return match[1], match[2].lower()


def _check_end(file: ShardFile, offset: int, problems: list[ShardError]) -> None:
    """Two zero blocks end a tar, zeros pad it; anything else behind them would be lost in silence."""
    rest = file.size - offset
    window = file.read(offset, min(rest, 1 << 20))
    if window.count(0) != len(window):
        message = f"{rest} bytes follow the end marker at {offset} and are not read (were tars concatenated?)"
        problems.append(ShardError(file.name, "data_after_end", message))


def _drop_unfinished(groups: dict[str, dict[str, Member]], last_key: str) -> None:
    """Behind a broken header may lie more of the last sample: keep it only if it looks like the samples before it."""
    if last_key in groups:
        usual = Counter(tuple(members) for key, members in groups.items() if key != last_key)
        if tuple(groups[last_key]) not in usual:
            del groups[last_key]


def _number(data: bytes) -> int:
    """An octal field, or GNU's base-256 form for sizes over 8 GiB."""
    if data[0] & 0x80:
        return int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
    digits = data.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits else 0


def decimal(text: str, shard: str, offset: int) -> int:
    """The size that a pax header before `offset` bytes states; a ShardError where it is no number."""
    if not text.isdigit():
        raise ShardError(shard, "bad_header", f"pax header before {offset} has size {text!r}")
    return int(text)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
