"""Shards behind URLs, through fsspec: http(s) here, s3, gcs and others where their plugins are installed.

Enters: a URL and `RemoteConfig`. Leaves: ranges of bytes, as from a local file. Costs a request for the size when a
shard is opened, and one a block (4 MiB) that is not in the node's cache; neighbouring samples share blocks.

Requests that fail for a while (no connection, cut answers, 408, 425, 429, 5xx, over the deadline) are repeated after
growing pauses; what cannot get better (404, no permission, other content than was opened) is an error at once. A server
that ignores ranges is noticed, and its shard is read whole, into a file of the cache.

What is cached is named by the content: by its name, size and the version that the server states; and by the content's
tag (`tag`, four small ranges) where that may not be enough. So are URLs with a query: of `get?id=1` and `sig=5f3a`
nobody knows which part tells shards apart and which is a signature, another in each run. Their content decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

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


def _ignore() -> None:
    """For callers whom no progress concerns."""


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
        folder = Path(config.cache_dir).expanduser()
        self._cache = BlockCache(folder, config.cache_mb << 20)
        self._wholes = BlockCache(folder / "whole", config.cache_mb << 19, sets=1)

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

    @property
    def has_ranges(self) -> bool:
        """Whether the server gives ranges, as far as is known."""
        return self._ranges

    def missing_blocks(self, offset: int, size: int) -> list[int]:
        """The blocks of a range that the cache lacks.

        Raises:
            ShardError: nothing tells which content the cache is to have.
        """
        missing = [block for block in self._blocks(offset, size) if not self._cache.has(self._block_name(block))]
        return [] if missing and self._wholes.has(self._key) else missing

    def fetch_block(self, block: int) -> bytes:
        """Bring one block into the cache, whatever it takes; another process that is at it is waited for.

        Raises:
            NoRangesError: the shard is to be fetched whole. ShardError: the server does not give it.
        """
        name = self._block_name(block)
        start, size = block * self._block, self._block_size(block)
        with self._cache.turn(name, self._config.max_requests, self._config.timeout_s):
            data = self._cache.read(name, 0, size)
            if data is None:
                data = self._range(start, start + size)
                self._cache.put(name, data)
        return data

    def fetch_whole(self, wanted: Collection[int] = (), progress: Callable[[], None] = _ignore) -> dict[int, bytes]:
        """Bring the whole shard into the cache, once on this node; the `wanted` blocks come back in any case.

        `progress` is called as bytes come, and while another process brings them.

        Raises:
            ShardError: it is too large for the cache, or the server does not give it.
        """
        if self.size > self._config.cache_mb << 19:
            raise ShardError(
                self.name,
                "no_ranges",
                f"its server gives no ranges, and the shard ({self.size} bytes) takes more than half of "
                f"remote.cache_mb={self._config.cache_mb}: raise it, or read the shard with reader: webdataset",
            )
        num_bytes, found = 0, {}
        with self._cache.turn(self._key, self._config.max_requests, timeout_s=3600, waiting=progress):
            if self._wholes.has(self._key):
                held = {block: self._cached(block, block * self._block, self._block_size(block)) for block in wanted}
                found = {block: data for block, data in held.items() if data is not None}
                if len(found) == len(wanted):
                    return found
            pieces = _in_blocks(stream_whole(self._url, self._config, stated=self._stated), self._block)
            for number, data in enumerate(self._wholes.keep(self._key, self.size, pieces)):
                progress()
                num_bytes += len(data)
                if number in wanted:
                    found[number] = data
        if num_bytes != self.size:
            raise ShardError(self.name, "cut_shard", f"its server gave {num_bytes} of the {self.size} bytes it told")
        return found

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

    def _block_size(self, block: int) -> int:
        return min(self._block, self.size - block * self._block)

    def _blocks(self, offset: int, size: int) -> range:
        return range(offset // self._block, -(-(offset + size) // self._block))

    def _block_name(self, block: int) -> str:
        return f"{self._key}-{block}"

    def _cached(self, block: int, offset: int, size: int) -> bytes | None:
        """The part of `block` that the range wants, if the block or the whole shard is in the cache."""
        start = block * self._block
        first = max(0, offset - start)
        count = min(self._block, offset + size - start) - first
        data = self._cache.read(self._block_name(block), first, count)
        return self._wholes.read(self._key, start + first, count) if data is None else data

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
        if self._ranges:
            with suppress(NoRangesError), ThreadPoolExecutor(min(len(blocks), self._config.max_requests)) as pool:
                return dict(zip(blocks, pool.map(self.fetch_block, blocks), strict=True))
        return self.fetch_whole(blocks)

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


def fetch_all(
    ranges: Sequence[tuple[RemoteFile, int, int]], max_requests: int, progress: Callable[[], None] = _ignore
) -> None:
    """Bring all (file, offset, size) into the cache, side by side. What fails is told when it is read.

    `progress` is called, from several threads, as bytes come.
    """
    wanted: dict[tuple[RemoteFile, int], None] = {}
    for file, *place in ranges:
        with suppress(ShardError):
            wanted |= dict.fromkeys((file, block) for block in file.missing_blocks(*place))
    _side_by_side([partial(file.fetch_block, block) for file, block in wanted], max_requests, progress)
    whole = dict.fromkeys(file for file, _ in wanted if not file.has_ranges)
    _side_by_side([partial(file.fetch_whole, progress=progress) for file in whole], max_requests, progress)


def _side_by_side(tasks: Sequence[Callable[[], Any]], max_requests: int, progress: Callable[[], None]) -> None:
    """Do all tasks, whatever they raise."""
    if tasks:
        with ThreadPoolExecutor(min(len(tasks), max_requests)) as pool:
            for future in as_completed([pool.submit(task) for task in tasks]):
                future.exception()
                progress()


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
