"""Follow a tar's headers while its bytes go by to another reader, and say what is wrong with it.

Enters: pieces of bytes of any length, in order. Leaves: problems; how many bytes lie before the fault. Checks what
`scan_tar` checks of a file: checksums, ends of members, the end marker, what follows it. Costs the headers alone, data
is skipped.
"""

from __future__ import annotations

from data_pipelines.config import MAX_MEDIA_BYTES
from data_pipelines.errors import ShardError
from data_pipelines.shards.tar import (
    BLOCK,
    MAX_EXTENDED_HEADER,
    Header,
    decimal,
    key_and_suffix,
    parse_extended,
    parse_header,
)

# What the package's tar reader would make more of than their bytes: a sparse member of a few bytes may claim terabytes.
_EXPANDED = b"SX"
_ZEROS = bytes(BLOCK)


class TarWalk:
    """Follows a tar's headers as its bytes come by; `problem` is what ends it early, lesser ones go to `problems`.

    `name` is the shard's, `member` that of the member under way; `members` counts those that belong to samples.
    """

    def __init__(self, name: str, problems: list[ShardError]) -> None:
        self.problem: ShardError | None = None
        self.name, self._problems = name, problems
        self._at = self._skip = 0  # where the walk stands; bytes of data and padding still to pass
        self._padding = 0
        self.member, self.members = "", 0
        self._block = bytearray()
        self._extended: tuple[Header, bytearray] | None = None
        self._overrides: dict[str, str] = {}
        self._ended = False

    def feed(self, data: bytes) -> int:
        """Follow `data`; how many of its bytes may go on to the reader: all, or those before the fault."""
        place = 0
        while place < len(data) and self.problem is None:
            piece = data[place : place + (self._skip or BLOCK - len(self._block))]
            if self._ended:
                piece = data[place:]
                if piece.count(0) != len(piece):
                    self._fail("data_after_end", f"bytes follow the end marker at {self._at} and are not read")
            elif self._skip:
                self._skip -= len(piece)
                if self._extended is not None:
                    self._extended[1].extend(piece)
                    if not self._skip:
                        self._take_extended()
            else:
                self._block += piece
                if len(self._block) == BLOCK:
                    self._take_header(bytes(self._block))
                    self._block.clear()
            if self.problem is None:
                place += len(piece)
                self._at += len(piece)
        return place

    def finish(self) -> None:
        """The bytes ended; a second call does nothing."""
        if self.problem is not None or self._ended:
            return
        self._ended = True
        if self._at == 0:
            self._fail("bad_header", "the file is empty")
        elif self._skip > self._padding:
            self._fail("cut_shard", f"the shard ends at byte {self._at}, inside member {self.member!r}")
        elif self._block:
            self._fail("cut_shard", f"the shard ends inside a header, at byte {self._at}: copy it again")
        else:
            message = "no two zero blocks at the end; the members up to here are whole"
            self._problems.append(ShardError(self.name, "no_end_marker", message))

    def _take_header(self, block: bytes) -> None:
        if block == _ZEROS:
            self._ended = True
            return
        try:
            header = parse_header(block, self.name, self._at)
            if header.kind in _EXPANDED:
                raise self._sparse(header)
            if header.kind in b"xgLK":
                if header.size > MAX_EXTENDED_HEADER:
                    raise ShardError(self.name, "bad_header", f"extended header claims {header.size} bytes")
                self._extended = (header, bytearray())
            else:
                header = self._overridden(header)
                named = key_and_suffix(header, self.name, self._problems)  # tells of links and unsafe names
                self.members += named is not None
            self.member = header.name
            if header.size > MAX_MEDIA_BYTES:
                message = f"member {header.name!r} claims {header.size} bytes, limit {MAX_MEDIA_BYTES}"
                raise ShardError(self.name, "media_too_big", message)
        except ShardError as error:
            self._fail(error.reason, error.message)
            return
        self._padding = -header.size % BLOCK
        self._skip = header.size + self._padding
        if self._extended is not None and not self._skip:
            self._take_extended()

    def _overridden(self, header: Header) -> Header:
        overrides, self._overrides = self._overrides, {}
        size = decimal(overrides["size"], self.name, self._at) if "size" in overrides else header.size
        return Header(overrides.get("path", header.name), size, header.kind, header.crc)

    def _take_extended(self) -> None:
        assert self._extended is not None
        header, data = self._extended
        self._extended = None
        try:
            found = parse_extended(header, bytes(data[: header.size]), self.name, self._at)
            if any(field.startswith("GNU.sparse") for field in found):
                raise self._sparse(header)
        except ShardError as error:
            self._fail(error.reason, error.message)
            return
        self._overrides.update(found if header.kind != ord("g") else {})

    def _sparse(self, header: Header) -> ShardError:
        message = f"a sparse member (header {header.name!r}): write the tar anew, without sparse members"
        return ShardError(self.name, "bad_header", message)

    def _fail(self, reason: str, message: str) -> None:
        self.problem = ShardError(self.name, reason, message)
