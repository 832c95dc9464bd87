"""The roll of a folder: what its shards' side files count, in one file, so that a run opens thousands at once.

Enters: shards, and the name of what counts their text. Leaves: the counts of those on the roll whose file has kept its
size and times, or of a remote one the version that its server states. Costs 5 µs a shard, a remote one a request beside
others; looking into its side files takes 0.8 ms, a remote one's two requests, one after the other.

The roll decides nothing. A shard that is not on it, or was touched since, is judged by size and content as ever, and so
is every shard when its samples are needed. It lies in `.index/` with the side files: who removes these removes it, too.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import ShardError
from data_pipelines.index.places import side_places
from data_pipelines.shards.names import file_of, is_remote, public_name, split_name
from data_pipelines.shards.storage import REMOTE_DEFAULTS
from data_pipelines.whole import write_whole

_FORMAT = 2
# Size, and times of the last change of the content and of the file; or size and version, and the content's tag of a
# remote shard whose name others may share.
Stamp = list[int | str]


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples of shards: `num_samples` in the index, `usable` ones among them, and those `left_out`, by reason.

    `marks` of the shards' contents, in their order; see `ShardIndex.mark`.
    """

    num_samples: int
    usable: int
    left_out: Counter[str]
    marks: tuple[str, ...]

    @staticmethod
    def sum(parts: Iterable[Counts]) -> Counts:
        """The counts of all parts together."""
        num_samples, usable, left_out, marks = 0, 0, Counter[str](), list[str]()
        for part in parts:
            num_samples, usable = num_samples + part.num_samples, usable + part.usable
            left_out.update(part.left_out)
            marks += part.marks
        return Counts(num_samples, usable, left_out, tuple(marks))


def forget_rolls(shards: Sequence[str]) -> None:
    """Delete the rolls of the shards' folders, whatever counted the text: these are to be looked into again."""
    for folder in {_folder(shard) for shard in shards}:
        for place in _places(folder, ""):
            for path in place.parent.glob(f"{glob.escape(place.name)}*"):
                with suppress(OSError):  # a read-only data set
                    path.unlink()


class Roll:
    """The counts of those of `shards` that are `known` and unchanged.

    `name` distinguishes what counts text; see `build.Counting.name`.
    """

    def __init__(self, shards: Sequence[str], name: str, remote: RemoteConfig = REMOTE_DEFAULTS) -> None:
        self.known: dict[str, Counts] = {}
        self._name = name
        # Taken before anything is counted: a shard that is replaced meanwhile is not taken for the one counted.
        self._stamps = _stamps(shards, remote)
        self._folders: dict[str, list[str]] = defaultdict(list)
        for shard in self._stamps:
            self._folders[_folder(shard)].append(shard)
        for folder, mine in self._folders.items():
            for path in _places(folder, self._name):
                entries = _load(path)
                for shard in mine:
                    entry = entries.get(self._name_of(shard))
                    if entry is not None and entry["stamp"] == self._stamps[shard]:
                        left_out = Counter(entry["left_out"])
                        self.known[shard] = Counts(entry["samples"], entry["usable"], left_out, (entry["mark"],))

    def add(self, counted: Mapping[str, Counts]) -> None:
        """Put what was counted on the rolls of its folders.

        What others put there at the same time may get lost, and is counted again: the roll saves work, nothing else.
        """
        for folder, mine in self._folders.items():
            new = {
                self._name_of(shard): {
                    "stamp": self._stamps[shard],
                    "samples": counted[shard].num_samples,
                    "usable": counted[shard].usable,
                    "left_out": counted[shard].left_out,
                    "mark": counted[shard].marks[0],
                }
                for shard in mine
                if shard in counted
            }
            for path in _places(folder, self._name) if new else ():
                with suppress(OSError):  # a read-only data set
                    content = {"format": _FORMAT, "shards": {**_load(path), **new}}
                    write_whole(path, json.dumps(content, separators=(",", ":")).encode())
                    break

    def _name_of(self, shard: str) -> str:
        """A shard in its folder; the same lines with media in another folder are another shard."""
        path, root = split_name(public_name(shard))
        shared = is_remote(shard) and public_name(shard) != shard
        return os.path.basename(path) + root + (f"?{self._stamps[shard][-1]}" if shared else "")


def _folder(shard: str) -> str:
    return os.path.dirname(file_of(public_name(shard)))


def _places(folder: str, name: str) -> list[Path]:
    return side_places(os.path.join(folder, "shards"), f"roll-{name}")


def _stamps(shards: Sequence[str], remote: RemoteConfig) -> dict[str, Stamp]:
    """The stamps of those that can be opened; remote ones are asked side by side."""
    stamps = {shard: _stamp(shard) for shard in shards if not is_remote(shard)}
    if urls := [shard for shard in shards if is_remote(shard)]:
        with ThreadPoolExecutor(min(len(urls), remote.max_requests)) as pool:
            stamps |= zip(urls, pool.map(lambda url: _remote_stamp(url, remote), urls), strict=True)
    return {shard: stamp for shard, stamp in stamps.items() if stamp is not None}


def _stamp(shard: str) -> Stamp | None:
    try:
        facts = os.stat(file_of(shard))
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _remote_stamp(url: str, remote: RemoteConfig) -> Stamp | None:
    """None also where the server states no version: then only a look at the content tells."""
    from data_pipelines.shards.remote import RemoteFile  # fsspec loads only where it is needed

    try:
        file = RemoteFile(url, remote)
        tag = [file.tag()] if file.version and file.shares_name else []
    except ShardError:
        return None
    return [file.size, file.version, *tag] if file.version else None


def _load(path: Path) -> dict[str, Any]:
    """The entries of a roll; none of one that is absent, cut, or of another format."""
    try:
        content = json.loads(path.read_bytes())
        entries: dict[str, Any] = content["shards"] if content["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries
