"""What a shard's name says: a tar or a JSON-lines file with the folder of its media, here or behind a URL.

web-00000.tar                      a webdataset tar
train.jsonl                        records, one a line; they name media relative to the file's own folder
train.jsonl::/data/images          the same, media relative to /data/images
https://host/web-00000.tar?sig=…   a tar behind a URL; the query may hold a signature, and is shown nowhere
https://user:word@host/a.tar       the same behind a password, which is shown nowhere either
"""

from __future__ import annotations

import os

WEB = ("http", "https")
LINES_EXTENSIONS = (".jsonl", ".ndjson")
_SEPARATOR = "::"


def is_remote(shard: str) -> bool:
    """Whether a shard is read through fsspec: a URL of any scheme but `file://`."""
    return "://" in shard and not shard.startswith("file://")


def public_name(shard: str) -> str:
    """The shard as messages, ledgers and pages name it: a URL without its query and without passwords.

    On the web the user goes, too, for it may be a token; elsewhere it may name a place.

    >>> public_name("https://user:word@host/a.tar?sig=1"), public_name("abfs://box@account/a.tar")
    ('https://host/a.tar', 'abfs://box@account/a.tar')
    """
    if not is_remote(shard):
        return shard
    scheme, _, rest = shard.partition("?")[0].partition("://")
    place, slash, path = rest.partition("/")
    user, at, host = place.rpartition("@")
    user = "" if scheme.lower() in WEB else user.partition(":")[0] + at
    return f"{scheme}://{user}{host}{slash}{path}"


def changed_since(shard: str) -> str:
    """A clause for messages: the shard is not the one that was indexed, and what to do."""
    name = os.path.basename(file_of(public_name(shard)))
    return (
        f"{public_name(shard)} was changed after it was indexed: start again, which indexes it anew (if its size and "
        f"time were kept, run `qwen2vl-data index --rebuild` on it first, or delete .index/{name}.* beside it)"
    )


def is_lines(shard: str) -> bool:
    """Whether `shard` is a file of JSON lines with its media beside it, rather than a tar."""
    return split_name(shard)[0].lower().endswith(LINES_EXTENSIONS)


def split_name(shard: str) -> tuple[str, str]:
    """The file of a shard, and what its name says after it ("" or "::FOLDER").

    >>> split_name("train.jsonl::/data/images")
    ('train.jsonl', '::/data/images')
    """
    path, separator, folder = shard.partition(_SEPARATOR)
    return (path, separator + folder) if path.lower().endswith(LINES_EXTENSIONS) else (shard, "")


def file_of(shard: str) -> str:
    """The path of the shard's own file."""
    return split_name(shard)[0]


def media_root(shard: str) -> str:
    """The folder below which the lines of `shard` name their media."""
    path, rest = split_name(shard)
    return os.path.expanduser(rest.removeprefix(_SEPARATOR)) if rest else os.path.dirname(path) or "."
