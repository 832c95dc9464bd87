"""Shards behind URLs, through fsspec: http(s) here, s3, gcs and others where their plugins are installed.

Enters: a URL and `RemoteConfig`. Leaves: ranges of bytes, as from a local file. Costs a request for the size when a
shard is opened, and one a block (4 MiB) that is not in the node's cache; neighbouring samples share blocks.

Requests that fail for a while (no connection, cut answers, 408, 425, 429, 5xx, over the deadline) are repeated after
growing pauses; what cannot get better (404, no permission, other content than was opened) is an error at once. A server
that ignores ranges is noticed, and its shard is read whole, into the cache.

What is cached is named by the content: by its name, size and the version that the server states; and by the content's
tag (`tag`, four small ranges) where that may not be enough. So are URLs with a query: of `get?id=1` and `sig=5f3a`
nobody knows which part tells shards apart and which is a signature, another in each run. Their content decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fsspec.asyn import sync

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.shards.cache import BlockCache
from data_pipelines.shards.connection import attempt, call, filesystem_of, is_web, stream_whole
from data_pipelines.shards.names import public_name
from data_pipelines.shards.tag import TAG_LENGTH, content_tag
from data_pipelines.shards.web import NoRangesError, Stated, fetch_range

T = TypeVar("T")
READ_AHEAD = 4
# What changes with the content, by its name in `info`: of the web and s3, gcs, hf, then sftp, smb and mounted folders.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "mtime")


class RemoteFile:
    """A shard behind a URL; a `ShardFile`. `name` is the URL without its query, which may hold a signature.

    `version` is what the server says of its content (ETag, or time of the last change), "" if it says nothing.

    Raises:
        ShardError: it does not exist, its size is not told, or it cannot be read for longer than all attempts take.
    """

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self.name = public_name(url)
        self.shares_name = url != self.name
        self._url, self._config = url, config
        self._block = config.block_kb << 10
        self._ranges = True
        self._last_missed = -2
        facts = self._attempt(lambda: call(url, config, "info"), "cannot be opened", "unreadable_shard")
        if not isinstance(facts.get("size"), int):
            raise ShardError(
                self.name, "unknown_size", "its server does not tell its size: read it with reader: webdataset"
            )
        self.size: int = facts["size"]
        self.time_ns = 0
        self._stated: Stated = next(((name, str(facts[name])) for name in _VERSIONS if facts.get(name)), ("", ""))
        self.version = self._stated[1]
        self._cache = BlockCache(Path(config.cache_dir).expanduser(), config.cache_mb << 20)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`.

        Raises:
            ShardError: the file ends before, or the server does not give them.
        """
        if offset + size > self.size:
            raise ShardError(self.name, "cut_shard", f"{size} bytes wanted at {offset}, the file has {self.size}")
        parts: dict[int, bytes] = {}
        missing = []
        for block in self._blocks(offset, size):
            part = self._cached(block, offset, size)
            if part is None:
                missing.append(block)
            else:
                parts[block] = part
        if missing:
            for block, data in self._fetch(self._with_next(missing)).items():
                start = block * self._block
                parts[block] = data[max(0, offset - start) : offset + size - start]
        return b"".join(parts[block] for block in self._blocks(offset, size))

    def missing_blocks(self, offset: int, size: int) -> list[int]:
        """The blocks of a range that the cache lacks; none where the server gives no ranges.

        Raises:
            ShardError: nothing tells which content the cache is to have.
        """
        if not self._ranges:
            return []
        return [block for block in self._blocks(offset, size) if not self._cache.has(self._block_name(block))]

    def fetch_block(self, block: int) -> bytes:
        """Bring one block into the cache, whatever it takes; another process that is at it is waited for."""
        name = self._block_name(block)
        start = block * self._block
        size = min(self._block, self.size - start)
        with self._cache.turn(name, self._config.max_requests, self._config.timeout_s):
            data = self._cache.read(name, 0, size)
            if data is None:
                data = self._range(start, start + size)
                self._cache.put(name, data)
        return data

    def tag(self) -> str:
        """The content's tag, as a local copy has; of size and version where the server cannot give ranges.

        As of when it was first asked for. Kept in the cache while the server tells the same version.

        Raises:
            ShardError: the server gives neither ranges nor a version ("no_version"), or nothing.
        """
        return self._tag

    @cached_property
    def _tag(self) -> str:
        kept = f"{_digest(self._url, self.size, self.version)}-tag"
        held = self._cache.read(kept, 0, TAG_LENGTH) if self.version else None
        if held is not None:
            return held.decode()
        try:
            tag = content_tag(self.size, lambda offset, size: self._range(offset, offset + size))
        except NoRangesError as error:
            if not self.version:
                raise ShardError(
                    self.name,
                    "no_version",
                    "its server gives no ranges and no version (ETag, Last-Modified), so that nothing tells whether a "
                    "cached copy is of the same content: read it with reader: webdataset",
                ) from error
            known = f"{self.size} {self.version}{self._url if self.shares_name else ''}"
            return hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
        if self.version:
            self._cache.put(kept, tag.encode())
        return tag

    @cached_property
    def _key(self) -> str:
        """What names this content in the cache."""
        tag = self.tag() if self.shares_name or not self.version else ""
        return _digest(self.name, self.size, self.version, tag, self._block)

    def stream(self) -> Iterator[bytes]:
        """All bytes in order, block by block, not through the cache: for shards that are read once."""
        offset = 0
        while offset < self.size and self._ranges:
            try:
                data = self._range(offset, min(offset + self._block, self.size))
            except NoRangesError:
                break
            offset += len(data)
            yield data
        if offset < self.size:
            yield from stream_whole(self._url, self._config, offset, self._stated)

    def read_beside(self, name: str) -> bytes | None:
        """The whole file `name`, relative to the shard's folder; None where there is none (or the URL is signed)."""
        if "?" in self._url:
            return None
        url = f"{self._url.rpartition('/')[0]}/{name}"
        try:
            data = attempt(
                lambda: call(url, self._config, "cat_file"),
                self._config,
                public_name(url),
                lambda e: ShardError(url, "", e),
            )
        except ShardError:
            return None
        return bytes(data)

    def close(self) -> None:
        """Nothing to give back: connections belong to the process."""

    def _blocks(self, offset: int, size: int) -> range:
        return range(offset // self._block, -(-(offset + size) // self._block))

    def _block_name(self, block: int) -> str:
        return f"{self._key}-{block}"

    def _cached(self, block: int, offset: int, size: int) -> bytes | None:
        """The part of `block` that the range wants, if the block is in the cache."""
        start = block * self._block
        first = max(0, offset - start)
        return self._cache.read(self._block_name(block), first, min(self._block, offset + size - start) - first)

    def _with_next(self, missing: list[int]) -> list[int]:
        """The missing blocks, and the next few where a shard is read from start to end (when it is indexed)."""
        in_order = missing[0] == self._last_missed + 1
        if in_order and self._ranges:
            end = min(missing[-1] + READ_AHEAD, -(-self.size // self._block))
            missing = [*missing, *range(missing[-1] + 1, end)]
        self._last_missed = missing[-1]
        return missing

    def _fetch(self, blocks: Sequence[int]) -> dict[int, bytes]:
        """Blocks by number, read side by side."""
        if not self._ranges:
            return self._fetch_whole(blocks)
        try:
            with ThreadPoolExecutor(min(len(blocks), self._config.max_requests)) as pool:
                return dict(zip(blocks, pool.map(self.fetch_block, blocks), strict=True))
        except NoRangesError:
            return self._fetch_whole(blocks)

    def _fetch_whole(self, blocks: Sequence[int]) -> dict[int, bytes]:
        """Read the whole shard into the cache, once on this node; the wanted blocks come back in any case."""
        if self.size > self._config.cache_mb << 19:
            raise ShardError(
                self.name,
                "no_ranges",
                f"its server gives no ranges, and the shard ({self.size} bytes) takes more than half of "
                f"remote.cache_mb={self._config.cache_mb}: raise it, or read the shard with reader: webdataset",
            )
        found: dict[int, bytes] = {}
        with self._cache.turn(self._key, self._config.max_requests, timeout_s=3600):
            for block in blocks:
                size = min(self._block, self.size - block * self._block)
                data = self._cache.read(self._block_name(block), 0, size)
                if data is not None:
                    found[block] = data
            if len(found) < len(blocks):
                for number, data in enumerate(
                    _in_blocks(stream_whole(self._url, self._config, stated=self._stated), self._block)
                ):
                    self._cache.put(self._block_name(number), data)
                    if number in blocks:
                        found[number] = data
        if len(found) < len(blocks):
            raise ShardError(self.name, "cut_shard", f"its server gave less than the {self.size} bytes it told")
        return found

    def _range(self, start: int, end: int) -> bytes:
        """Bytes [start, end), past the cache."""
        return self._attempt(lambda: self._range_once(start, end), f"{end - start} bytes at {start}", "read_failed")

    def _range_once(self, start: int, end: int) -> bytes:
        if end == start:
            return b""
        if not self._ranges:
            raise NoRangesError(self.name, "no_ranges", "its server gives no ranges")
        if is_web(self._url):
            files, _ = filesystem_of(self._url, self._config)
            wanted = (files, self._url, start, end, self.size, self._stated)
            try:
                data = sync(files.loop, fetch_range, *wanted, timeout=self._config.timeout_s)
            except NoRangesError:
                self._ranges = False
                raise
        else:
            data = call(self._url, self._config, "cat_file", start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came instead of {end - start}")
        return bytes(data)

    def _attempt(self, request: Callable[[], T], what: str, reason: str) -> T:
        return attempt(
            request, self._config, self.name, lambda error: ShardError(self.name, reason, f"{what}: {error}")
        )


def fetch_all(ranges: Sequence[tuple[RemoteFile, int, int]], max_requests: int) -> None:
    """Bring all (file, offset, size) into the cache, side by side. What fails is told when it is read."""
    wanted: dict[tuple[RemoteFile, int], None] = {}
    for file, *place in ranges:
        with suppress(ShardError):
            wanted |= dict.fromkeys((file, block) for block in file.missing_blocks(*place))
    if len(wanted) > 1:
        with ThreadPoolExecutor(min(len(wanted), max_requests)) as pool:
            for future in [pool.submit(file.fetch_block, block) for file, block in wanted]:
                future.exception()


def _digest(*facts: object) -> str:
    return hashlib.blake2b("\n".join(map(str, facts)).encode(), digest_size=12).hexdigest()


def _in_blocks(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `size`, the last one shorter."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
