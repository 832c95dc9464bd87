"""Where shards lie: a file that is read by (offset, size), and the list of files that a pattern names.

Enters: paths and URLs, globs and brace ranges. Leaves: bytes of exactly the size asked for. Costs one `pread` a read
(for URLs see `remote`); file positions are never shared, so a `ShardFile` serves any number of threads and workers.
"""

from __future__ import annotations

import glob
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.shards.names import file_of, is_remote, public_name, split_name
from data_pipelines.shards.tag import content_tag

REMOTE_DEFAULTS = RemoteConfig()


class ShardFile(Protocol):
    """A shard that can be read at any place. `size` in bytes; `tag` changes when the content does, not its time.

    `time_ns` is when it was last changed, 0 where only a server could say. `shares_name`: other shards may have the
    same name, which leaves out the query of a URL.
    """

    name: str
    size: int
    time_ns: int
    shares_name: bool

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`, or ShardError."""
        ...

    def tag(self) -> str:
        """A short string that identifies the content."""
        ...

    def close(self) -> None:
        """Give back the descriptor or connection."""
        ...


class LocalFile:
    """A shard on a mounted file system."""

    shares_name = False

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            self._descriptor = os.open(file_of(path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(path, "unreadable_shard", f"cannot be opened: {error.strerror}") from error
        facts = os.fstat(self._descriptor)
        self.size, self.time_ns = facts.st_size, facts.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`.

        Raises:
            ShardError: the file ends before, or the device reports an error.
        """
        data = b""
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise ShardError(self.name, "read_failed", f"{size} bytes at {offset}: {error.strerror}") from error
        if len(data) != size:
            raise ShardError(self.name, "cut_shard", f"{size} bytes wanted at {offset}, {len(data)} there")
        return data

    def tag(self) -> str:
        """A hash of the size and of four 4 KiB blocks from start to end: copies keep it, other content changes it."""
        return content_tag(self.size, self.read)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_shard(path: str, remote: RemoteConfig = REMOTE_DEFAULTS) -> ShardFile:
    """Open a shard for reading; `remote` says how, if it is a URL.

    Raises:
        ShardError: it does not exist or cannot be read; the message holds its path.
    """
    if is_remote(path):
        from data_pipelines.shards.remote import RemoteFile  # fsspec and aiohttp load only where they are needed

        return RemoteFile(path, remote)
    return LocalFile(path.removeprefix("file://"))


def read_beside(file: ShardFile, name: str) -> bytes | None:
    """The file `name`, relative to a remote shard's folder; None where there is none."""
    from data_pipelines.shards.remote import RemoteFile

    return file.read_beside(name) if isinstance(file, RemoteFile) else None


def fetch_ranges(
    ranges: Sequence[tuple[ShardFile, int, int]], remote: RemoteConfig, progress: Callable[[], None]
) -> None:
    """Bring (file, offset, size) of remote files into the cache, side by side; what fails is told when it is read.

    `progress` is called, from several threads, as bytes come.
    """
    from data_pipelines.shards.remote import RemoteFile, fetch_all

    mine = [(file, at, size) for file, at, size in ranges if isinstance(file, RemoteFile)]
    fetch_all(mine, remote.max_requests, progress)


class OpenShards:
    """At most `limit` shards kept open, the least recently used closed first. Not shared between threads."""

    def __init__(self, limit: int = 32, remote: RemoteConfig = REMOTE_DEFAULTS) -> None:
        self._limit, self._remote = limit, remote
        self._open: OrderedDict[str, ShardFile] = OrderedDict()

    def get(self, path: str) -> ShardFile:
        """The open file of `path`."""
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = open_shard(path, self._remote)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(path)
        return file

    def close(self) -> None:
        """Close all."""
        while self._open:
            self._open.popitem()[1].close()


def expand_shards(source: str, patterns: Sequence[str], remote: RemoteConfig = REMOTE_DEFAULTS) -> list[str]:
    """The shards that `patterns` name, each once. A pattern is a path, a glob, or holds ranges `{0000..0099}`.

    They are sorted by their public names: a URL's signature, another in each run, moves no shard. URLs that differ in
    their query alone stay as listed.

    `source` is the name of the mixture's source that lists them, "" where there is none. URLs may hold all of these,
    too; one without a glob is taken as it is, and missed when it is opened.

    Raises:
        ShardError: a pattern names no file: a mixture that silently lacks a source would train on something else.
    """
    found = dict[str, None]()
    named = f"source {source!r}" if source else "shards"
    for pattern in patterns:
        for path in expand_braces(os.path.expanduser(pattern.removeprefix("file://"))):
            matches = _matches(path, remote)
            if not matches:
                where = "" if is_remote(path) else _why_nothing(path)
                raise ShardError(named, "no_shards", f"no shard matches {public_name(path)!r}{where}")
            found |= dict.fromkeys(sorted(matches))
    if not found:
        raise ShardError(named, "no_shards", "names no shards: give paths or globs of tar files")
    return _each_once(sorted(found, key=public_name))


def _each_once(shards: Sequence[str]) -> list[str]:
    """`shards` without those that another spelling of the same folder names again: both would be read every epoch."""
    folders: dict[str, str] = {}
    first: dict[tuple[str, str], str] = {}
    for shard in shards:
        folder, name = ("", shard) if is_remote(shard) else os.path.split(file_of(shard))
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        first.setdefault((folders[folder], f"{name}{split_name(shard)[1]}"), shard)
    return list(first.values())


def _matches(path: str, remote: RemoteConfig) -> list[str]:
    if is_remote(path):
        if "*" not in path and "[" not in path:
            return [path]
        from data_pipelines.shards.connection import list_urls

        return list_urls(path, remote)
    path, root = split_name(path)
    found = [path] if os.path.isfile(path) else [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
    return [match + root for match in found]


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; `{x,y}.tar` → x.tar, y.tar; as webdataset writes them."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], expand_braces(pattern[match.end() :])
    if match[3] is not None:
        middle = match[3].split(",")
    else:
        middle = [f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    return [head + part + rest for part in middle for rest in tail]


def _why_nothing(path: str) -> str:
    """Why a path names no file, for the error message: which part of it exists."""
    if os.path.isdir(path):
        return f": it is a folder; use {os.path.join(path, '*.tar')!r}"
    if os.path.exists(path):
        return ": it is no file, and shards are read every epoch: a pipe could be read once"
    folder = Path(path).parent
    if folder.is_dir():
        return f" (the folder exists and holds {sum(1 for _ in folder.iterdir())} entries)"
    return f" (the folder {str(folder)!r} does not exist)"
