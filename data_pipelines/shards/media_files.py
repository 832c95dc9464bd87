"""Media in files of their own, named by annotations: names are untrusted, and lead nowhere but below one folder.

Enters: a name as written, and the folder. Leaves: the file's path, or its bytes. Costs about 30 us to follow the links
of a path. URLs, absolute paths, `..` and links that leave the folder, folders and devices are refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipelines.config import MAX_MEDIA_BYTES
from data_pipelines.decode.fields import shown
from data_pipelines.errors import MediaError


def resolve_media(name: object, root: Path, beside: Path | None, key: str) -> Path:
    """The file that an annotation names, looked for under `root`, then in the folder `beside` where that is inside.

    Raises:
        MediaError: URLs, absolute paths, NUL characters, and whatever leaves `root`, links included ("unsafe_path");
            what does not exist or is no regular file ("missing_media").
    """
    if not isinstance(name, str) or not name:
        raise MediaError(key, "missing_media", f"media name {shown(name)}: needs a relative path")
    if "://" in name or "\0" in name or name.startswith(("/", "~")) or "\\" in name:
        raise MediaError(key, "unsafe_path", f"media name {shown(name)}: needs a relative path under the media folder")
    top, unsafe = root.resolve(), False
    for folder in (root,) if beside is None else (root, beside):
        try:
            path = (folder / name).resolve()  # follows links: one that leads outside is refused like any such path
            if not path.is_relative_to(top):
                unsafe = True
            elif stat.S_ISREG(path.stat().st_mode):
                return path
        except (OSError, ValueError, RuntimeError):
            continue
    if unsafe:
        raise MediaError(key, "unsafe_path", f"media name {shown(name)} leads outside the media folder")
    raise MediaError(key, "missing_media", f"{shown(name)}: no such file under the media folder")


def read_media_file(name: str, root: Path, key: str) -> bytes:
    """The bytes of the file that an annotation names below `root`.

    Raises:
        MediaError: as `resolve_media`; no bytes ("empty_media"), over 1 GiB ("media_too_big"), or a failing disk.
    """
    path = resolve_media(name, root, None, key)
    try:
        with open(path, "rb", opener=_open_itself) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_MEDIA_BYTES:
                raise MediaError(key, "media_too_big", f"{shown(name)} has {size} bytes, limit {MAX_MEDIA_BYTES}")
            data = file.read(size)
    except OSError as error:
        raise MediaError(key, "missing_media", f"{shown(name)}: {error.strerror}") from error
    if not data:
        raise MediaError(key, "empty_media", f"{shown(name)} has no bytes")
    return data


def _open_itself(path: str, flags: int) -> int:
    """Open a resolved path; what was put in its place since, a link or a pipe, neither leads away nor blocks."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
