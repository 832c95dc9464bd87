"""Records and media bytes → webdataset tars, written through the webdataset package.

In:   key, record JSON, {media member name: encoded bytes}, one sample at a time.
Out:  `FOLDER/NAME-00000.tar`, `NAME-00001.tar`, … and `FOLDER/manifest.json` when the writer closes.
Cost: about 50 µs a sample with two members; nothing is kept but the sample's own bytes.

The same samples give the same bytes: members have a fixed owner and time. A shard appears under its name only when it
is finished and on disk (written as `.NAME-00000.tar.part`, fsync, rename), so a reader never meets half a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import webdataset

from data_pipelines.errors import RecordError, ShardError, UserError
from data_pipelines.whole import write_whole

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """One finished shard: file name, number of samples, size in bytes."""

    path: str
    records: int
    bytes: int


class ShardWriter:
    """Writes samples into numbered shards of at most `max_records` samples and about `max_bytes` bytes.

    A context manager: leaving it normally finishes the last shard and writes the manifest; leaving it with an exception
    removes the unfinished shard, writes no manifest, and keeps the shards that were finished.
    `first_shard` lets several writers fill one folder; give all but one of them `manifest=None`.

    >>> with ShardWriter(Path("shards"), "web") as writer:                      # doctest: +SKIP
    ...     writer.write("web/0001", {"caption": "a dog"}, {"0.jpg": jpeg_bytes})
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        max_records: int = 10_000,
        max_bytes: int = 1 << 30,
        first_shard: int = 0,
        manifest: str | None = MANIFEST_NAME,
    ) -> None:
        if not name or "/" in name or "%" in name:
            raise UserError(f"shard name {name!r}: give a plain file-name prefix without '/' and '%'")
        self.folder = folder
        self.shards: list[ShardFacts] = []
        self._manifest = manifest
        self._stream: BinaryIO | None = None
        self._keys: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        # "%%" survives ShardWriter's own `pattern % number`, so a folder may hold a percent sign.
        self._writer = webdataset.ShardWriter(
            f"{str(folder).replace('%', '%%')}/.{name}-%05d.tar.part",
            maxcount=max_records,
            maxsize=max_bytes,
            post=self._publish,
            start_shard=first_shard,
            verbose=0,
            opener=self._open,
            encoder=False,
            user="root",
            group="root",
            mtime=0,  # an int: a float would add a PAX header to every member
            format="PAX_FORMAT",  # USTAR cannot hold long keys; short ones come out the same
        )

    def write(self, key: str, record: Mapping[str, Any], media: Mapping[str, bytes]) -> None:
        """Add one sample.

        `key` may hold '/', but its last component no '.', because the key ends at the first dot. `media` maps member
        suffixes such as "0.jpg" to encoded bytes.

        Raises:
            RecordError: a key or member name that a reader would split differently, or a record that is not JSON.
            ShardError: the key is already in this writer's shards; readers would merge the two samples.
        """
        base = key.rpartition("/")[2]
        if not base or "." in base or key.startswith("/") or ".." in key.split("/"):
            raise RecordError(key, "bad_key", "a key is relative, and its last part is not empty and has no '.'")
        if key in self._keys:
            raise ShardError(key, "duplicate_key", "the key was written before; give every sample its own")
        for name in media:
            if "/" in name or name.startswith((".", "_")) or name == "json":
                raise RecordError(key, "bad_member", f"media member {name!r}: use a plain suffix such as '0.jpg'")
        try:
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RecordError(key, "bad_json", f"the record cannot be written as JSON: {error}") from error
        self._keys.add(key)
        self._writer.write({"__key__": key, "json": text.encode(), **media})

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        if self._stream is not None and self._writer.count == 0:
            self._discard()  # the package opens its first shard at once; an empty shard helps nobody
        self._writer.finish()
        if self._manifest is not None:
            write_manifest(self.folder / self._manifest, {"shards": [asdict(shard) for shard in self.shards]})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def _open(self, path: str) -> BinaryIO:
        self._stream = open(path, "wb")  # noqa: SIM115  closed in _publish or _discard
        return self._stream

    def _publish(self, path: str) -> None:
        """Move a finished shard to its name. Called by the package after the tar's end marker was written."""
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        part = Path(path)
        final = part.with_name(part.name.removeprefix(".").removesuffix(".part"))
        part.replace(final)
        self.shards.append(ShardFacts(final.name, self._writer.count, final.stat().st_size))

    def _discard(self) -> None:
        """Drop the open shard."""
        if self._stream is None:
            return
        with suppress(OSError):  # closing writes the tar's end; on a full disk that fails, and the file goes anyway
            self._writer.tarstream.close()
            self._stream.close()
        Path(self._stream.name).unlink(missing_ok=True)
        self._stream = None
        self._writer.tarstream = None


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that `path` holds either the whole of it or what it held before."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
