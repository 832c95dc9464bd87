"""Names of a sample's members: which are pictures or clips, and in which order.

A member's name is what follows the key's first dot in the tar: "0.jpg" of "000001.0.jpg".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from data_pipelines.samples import MediaKind

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
VIDEO_EXTENSIONS = frozenset({"mp4", "mov", "mkv", "webm", "avi", "ivf", "m4v", "mpg", "mpeg", "ts", "flv", "wmv"})


def extension(name: str) -> str:
    """The letters after the last dot, lower case ("jpg" also for a member named just "jpg")."""
    return name.rsplit(".", 1)[-1].lower()


def media_kind(name: str) -> MediaKind | None:
    """What a member's extension says it is, None for other members. A GIF is an image unless a part says "video"."""
    suffix = extension(name)
    return "image" if suffix in IMAGE_EXTENSIONS else "video" if suffix in VIDEO_EXTENSIONS else None


def media_names(members: Iterable[str]) -> tuple[str, ...]:
    """The members that are pictures or clips, in natural order: 2.jpg before 10.jpg."""
    return tuple(sorted((name for name in members if media_kind(name)), key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    # Split at digits: text stands at even places, digits at odd ones, so that equal places compare alike.
    return [(int(piece), "") if i % 2 else (-1, piece) for i, piece in enumerate(re.split(r"([0-9]{1,9})", name))]
