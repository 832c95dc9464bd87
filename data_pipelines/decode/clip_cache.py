"""Decoded, resized clips on local disk: bounded in bytes, shared by all workers and runs of a node.

Enters: a clip's bytes with what is to become of it (frames, size, backend), or its frames. Leaves: the frames, or None.
The name of an entry is a hash of all that, so another budget or a changed clip is another entry, and nothing is ever
stale. Costs the hashing of the clip (1 ms a MB) and the reading of its frames (0.5 ms a MB), where decoding costs one
second of CPU for 40 frames of 720p. A pair of frames takes 4.7 KB a token: a clip of 768 tokens 3.6 MB.

Plain files through `shards.cache` (atomic rename, least recently used first, a lock only while room is made), because
the well-known package for this, diskcache, stores by pickle (CVE-2025-69872) and is not maintained any more. Each entry
ends in its CRC-32: what a disk returns otherwise than it was written is decoded again, never trained on.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.config import LoaderConfig
from data_pipelines.errors import UserError
from data_pipelines.samples import Media, MediaPlan
from data_pipelines.shards.cache import BlockCache

SETS = 16
_FORMAT = 1  # to be raised whenever the same clip and plan give other frames
_CRC_BYTES = 4


def open_clip_cache(settings: LoaderConfig) -> ClipCache | None:
    """The cache that the loader's settings ask for, None for none.

    Raises:
        UserError: its folder can be neither made nor written to.
    """
    if settings.clip_cache is None:
        return None
    folder = Path(settings.clip_cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"loader.clip_cache={settings.clip_cache}: no such folder can be made ({error})") from error
    if not writable:
        raise UserError(f"loader.clip_cache={settings.clip_cache}: not writable; name another folder, or null")
    return ClipCache(folder, int(settings.clip_cache_gb * 1e9))


class ClipCache:
    """At most `max_bytes` of frames in `folder`, besides what is being written; a clip over a 16th of it is not kept.

    Safe under any number of processes; it pickles, and holds nothing open.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._files = BlockCache(folder, max_bytes, SETS)

    def name(self, data: bytes, media: Media, plan: MediaPlan, backend: str) -> str:
        """The entry of clip `data`, taken for `media` and decoded as planned by `backend`."""
        digest = hashlib.blake2b(data, digest_size=16)
        wanted = (_FORMAT, backend, media.width, media.height, plan.num_frames, plan.height, plan.width)
        digest.update(repr(wanted).encode())
        return digest.hexdigest()

    def get(self, name: str, shape: tuple[int, int, int, int]) -> NDArray[np.uint8] | None:
        """The frames uint8 [N, h, w, 3] of an entry, writable; None where it is absent, cut or damaged."""
        size = int(np.prod(shape))
        data = self._files.read(name, 0, size + _CRC_BYTES)
        if data is None:
            return None
        frames = np.frombuffer(data, np.uint8, size).copy()  # torch wants memory that can be written to
        if zlib.crc32(frames.data) != int.from_bytes(data[size:], "little"):
            return None
        return frames.reshape(shape)

    def put(self, name: str, frames: NDArray[np.uint8]) -> None:
        """Keep the frames of an entry. A disk that is full or read-only costs the cache, never the sample."""
        content = np.ascontiguousarray(frames).tobytes()
        self._files.put(name, content + zlib.crc32(content).to_bytes(_CRC_BYTES, "little"))
