"""Shards read once from start to end, through the webdataset package, with what it keeps silent said aloud.

Enters: a path or URL (plain or gzip). Leaves: samples with their bytes, in tar order, and the shard's problems. Costs
one pass; nothing is kept but the sample at hand and the keys seen.

The package ends a shard at a corrupt header without a word. So the bytes pass through `TarWalk` on their way to it, and
its findings become problems. Nothing is decoded by the package, and none of its openers runs.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.shards.names import is_remote, public_name
from data_pipelines.shards.tar import member_name, split_name
from data_pipelines.shards.walk import TarWalk

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members that share a key, by suffix ("json", "0.jpg"), as stored."""

    key: str
    members: dict[str, bytes]


def stream_samples(
    path: str, remote: RemoteConfig, problems: list[ShardError], watch: Callable[[], None] = lambda: None
) -> Generator[RawSample, None, None]:
    """The whole samples of a shard in tar order; what is wrong with it is appended to `problems` as it is found.
    `watch` is called whenever bytes of it came.

    A damaged shard gives the samples before the damage. Every member of a key stands together; what of a key comes
    later, and keys with a member twice, are problems and left out.
    """
    name = public_name(path)
    walk = TarWalk(name, problems)
    usual: Counter[tuple[str, ...]] = Counter()
    held: RawSample | None = None
    used = 0
    whole = True
    try:
        with closing(_open(path, remote)) as source:
            stream = _Checked(source, walk, watch)
            for sample in _grouped(stream, name, problems):
                if held is not None:
                    usual[tuple(held.members)] += 1
                    used += 1
                    yield held
                held = sample
            stream.drain()
            stream.check_complete()
            if stream.silent_fault and held is not None:
                # Behind it may lie more of the last sample: it is whole if it looks like the ones before it.
                whole = tuple(held.members) in usual
    except (ShardError, OSError, EOFError, zlib.error) as error:
        walk.problem = walk.problem or _as_problem(error, name)
    if held is not None and whole:
        used += 1
        yield held
    if walk.problem is not None:
        problem = walk.problem
        problems.append(ShardError(name, problem.reason, f"{problem.message}; {used} samples before it are used"))


def _grouped(stream: _Checked, name: str, problems: list[ShardError]) -> Iterator[RawSample]:
    """The package's part: members by its tar iterator, samples by its grouping."""
    files = tar_file_expander([{"url": name, "stream": stream}], handler=reraise_exception)
    seen: set[str] = set()
    repeated: set[str] = set()
    members = _once(stream.until_fault(files, repeated), name, seen, repeated, problems)
    for sample in group_by_keys(members, keys=split_name):
        key = sample["__key__"]
        if key not in repeated:
            yield RawSample(key, {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")})


def _once(
    members: Iterable[dict[str, Any]], shard: str, seen: set[str], repeated: set[str], problems: list[ShardError]
) -> Iterator[dict[str, Any]]:
    """Members of samples, each (key, suffix) once and all of a key together; the rest become problems."""
    key, suffixes = "", set[str]()
    for member in members:
        if not member:  # the package's mark of a shard's end
            yield member
            continue
        # Bytes that are no UTF-8 are named as the index names them.
        path = member["fname"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        path = member_name(path)
        named = _named(path)
        if named is None:
            continue
        if named[0] != key:
            seen.add(key)
            key, suffixes = named[0], set()
        if key in seen or named[1] in suffixes:
            if key not in repeated:
                message = "key repeated: which is meant is unknown" if key not in seen else "members are scattered"
                problems.append(ShardError(f"{shard}/{key}", "duplicate_key", f"{message}, dropped"))
            repeated.add(key)
            continue
        suffixes.add(named[1])
        yield {**member, "fname": path}


def _named(path: str) -> tuple[str, str] | None:
    """(key, suffix) of a member of a sample; None for others, and for names that point outside."""
    return None if ".." in path.split("/") else split_name(path)


def _as_problem(error: Exception, shard: str) -> ShardError:
    if isinstance(error, ShardError):
        return error
    # The package appends its own objects to an error's arguments.
    said = error.strerror if isinstance(error, OSError) and error.strerror else next(iter(error.args), "")
    what = f"{type(error).__name__}: {said}"
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return ShardError(shard, "cut_shard", f"its gzip data is damaged ({what})")
    if isinstance(error, (tarfile.TarError, ValueError)):
        return ShardError(shard, "bad_header", f"the tar reader gave up ({what})")
    return ShardError(shard, "read_failed", what)


class _Checked:
    """A readable stream whose bytes pass through a `TarWalk`; it ends where the walk finds a fault."""

    def __init__(self, source: BinaryIO, walk: TarWalk, watch: Callable[[], None]) -> None:
        self._source, self._walk, self._watch = source, walk, watch
        self._raised = self._at_end = False
        self._given = 0

    def __str__(self) -> str:
        return self._walk.name  # the package says in its errors what it read

    @property
    def silent_fault(self) -> bool:
        """The reader ended before the tar did, and said nothing."""
        problem = self._walk.problem
        return problem is not None and problem.reason != "data_after_end" and not self._raised

    def read(self, size: int = -1) -> bytes:
        if self._walk.problem is not None:
            return b""
        data = self._source.read(size)
        self._watch()
        if not data:
            self._at_end = True
            self._walk.finish()
        return data[: self._walk.feed(data)]

    def until_fault(self, files: Iterable[dict[str, Any]], unusable: set[str]) -> Iterator[dict[str, Any]]:
        """The reader's members; what it raises ends them, and makes the sample of the member under way unusable."""
        try:
            for member in files:
                self._given += bool(member) and _named(member_name(member["fname"])) is not None
                yield member
        except (ValueError, OSError, EOFError, zlib.error, tarfile.TarError) as error:
            self._raised = True
            # At the end of the bytes the walk has said what is missing, if anything is.
            if not (self._at_end and isinstance(error, tarfile.TarError)):
                self._walk.problem = self._walk.problem or _as_problem(error, self._walk.name)
            cut = split_name(self._walk.member)
            unusable.update(cut[:1] if cut is not None else ())

    def check_complete(self) -> None:
        """Whether the reader gave every member that passed; it ends silently at headers that it does not like."""
        walk = self._walk
        if walk.problem is None and self._given != walk.members:
            message = f"the tar reader gave {self._given} of {walk.members} members"
            walk.problem = ShardError(walk.name, "bad_header", message)

    def drain(self) -> None:
        """Follow what the tar reader left: the end marker's zeros, or more than that."""
        while self.read(1 << 20):
            continue


def _open(path: str, remote: RemoteConfig) -> BinaryIO:
    """The shard's bytes from the start, unpacked where they are gzip."""
    stream: io.BufferedReader
    if is_remote(path):
        stream = io.BufferedReader(_Chunks(_remote_chunks(path, remote)))
    else:
        try:
            stream = open(path, "rb")  # noqa: SIM115  the caller closes it
        except OSError as error:
            raise ShardError(path, "unreadable_shard", f"cannot be opened: {error.strerror}") from error
    if stream.peek(2)[:2] == _GZIP:
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    return stream


def _remote_chunks(url: str, remote: RemoteConfig) -> Iterator[bytes]:
    from data_pipelines.shards.connection import stream_whole  # fsspec loads only where it is needed
    from data_pipelines.shards.remote import RemoteFile

    try:
        return RemoteFile(url, remote).stream()
    except ShardError as error:
        if error.reason != "unknown_size":
            raise
        return stream_whole(url, remote)


class _Chunks(io.RawIOBase):
    """A raw stream over pieces of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
