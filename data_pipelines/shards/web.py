"""One range of a shard behind http(s), and whether a reply is what was asked for, of the content that was opened.

Enters: a URL, a range, and what the server stated of the content when the shard was opened. Leaves: the range's bytes.
Costs one request. fsspec gives such bytes without the reply's headers: there another range, or other content of the
same length, passes for the right one, and stays in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import ShardError
from data_pipelines.shards.names import changed_since, public_name

# A header, or a field of fsspec's `info`, and its value: ("ETag", '"5f3a"'); ("", "") where nothing is stated.
Stated = tuple[str, str]
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class NoRangesError(ShardError):
    """The server answers a range with something else: the whole file, another range, or a compressed one."""


async def fetch_range(files: Any, url: str, start: int, end: int, size: int, stated: Stated) -> bytes:
    """Bytes [start, end) of a file of `size`, by fsspec's web file system `files`. The reply may be cut.

    Raises:
        NoRangesError: the reply is no such range. ShardError: "shard_changed". Others, of aiohttp: the request failed.
    """
    session = await files.set_session()
    async with session.get(files.encode_url(url), headers={"Range": f"bytes={start}-{end - 1}"}) as reply:
        if reply.status == 416:  # the file ends before
            raise _changed(url)
        reply.raise_for_status()
        check_content(reply.headers, url, stated)
        given = _RANGE.match(reply.headers.get("Content-Range", "")) if reply.status == 206 else None
        if given is None and reply.status != 206 and (start, end) == (0, size):
            return bytes(await reply.read())  # all of it was asked for
        encoded = reply.headers.get("Content-Encoding", "identity") != "identity"  # of its range, nothing can be made
        if given is None or encoded or int(given[1]) != start or int(given[2]) >= end:
            raise NoRangesError(public_name(url), "no_ranges", "its server gives no ranges")
        if given[3] not in ("*", str(size)):
            raise _changed(url)
        return bytes(await reply.read())


def check_content(headers: Mapping[str, str], url: str, stated: Stated) -> None:
    """Refuse a reply that states another version of the content than `stated`; one that states none passes.

    Read from the reply rather than asked for by If-Match: that fails wherever tags are weak, as nginx may make them.

    Raises:
        ShardError: "shard_changed".
    """
    name, version = stated
    told = headers.get(name, "") if name else ""
    if told and told.removeprefix("W/") != version.removeprefix("W/"):
        raise _changed(url)


def _changed(url: str) -> ShardError:
    return ShardError(public_name(url), "shard_changed", changed_since(url))
