"""Media bytes at import: read within bounds, named by content, turned upright, with their coordinates.

Enters: a `MediaSource`. Leaves: the bytes to store, a member extension, and how the source's coordinates map to the
stored picture. A picture keeps its original bytes unless its EXIF orientation says that it lies otherwise than its
pixels do: then its pixels are turned once, here, and it is encoded again (JPEG at quality 95 without chroma
subsampling, others as PNG), so that nothing after the import has to know of orientations. Costs one header read
(10 to 50 us) a picture, and the listing of a clip's packets.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.config import MAX_MEDIA_BYTES, MediaConfig
from data_pipelines.decode.fields import shown
from data_pipelines.decode.image import decode_image, image_orientation, probe_image
from data_pipelines.decode.members import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, extension
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.errors import MediaError
from data_pipelines.samples import Media
from data_pipelines.sources.item import Box, MediaSource

JPEG_QUALITY = 95
MAX_ASPECT_RATIO = 200  # beyond it, the model's resizing has no answer

# (offset, bytes, extension) of what begins a file, the first that fits; other containers of clips are stored as mp4.
_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp"),
    (0, b"BM", "bmp"),
    (0, b"II*\0", "tif"),
    (0, b"MM\0*", "tif"),
    (0, b"\x1aE\xdf\xa3", "mkv"),
    (8, b"AVI ", "avi"),
    (0, b"DKIF", "ivf"),
    (0, b"FLV", "flv"),
    (0, b"\x00\x00\x01\xba", "mpg"),
    (0, b"G", "ts"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A medium as it is stored: bytes, member extension, and its facts (size as displayed; frames of a clip).

    `orientation` is the EXIF value that was applied to the pixels, 1 where none was; coordinates that were made on the
    unturned picture (`source_size` its width and height) are turned by `place`.
    """

    data: bytes
    extension: str
    media: Media
    orientation: int
    source_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in displayed pixels."""
        return self.media.width, self.media.height

    def facts(self) -> dict[str, float]:
        """The entry of the record's "media"."""
        media = self.media
        size: dict[str, float] = {"width": media.width, "height": media.height}
        if media.kind == "image":
            return size
        return {**size, "duration_s": media.duration_s, "fps": media.fps, "frames": media.frames}


def open_media(source: MediaSource, key: str, clips: ClipDecoder, verify: bool = False) -> Picture:
    """Read, check and turn one medium; clips are probed in a process of their own, under a deadline.

    `verify` decodes every picture once (4 ms a megapixel), so that cut and damaged ones are told now, not in training.

    Raises:
        MediaError: missing, empty, too large, no picture or clip by content, or broken as far as that shows without
            decoding (all of it where a picture must be turned, the first frame of a clip).
    """
    data = read_media(source, key)
    if source.kind == "video":
        clip = clips.probe(data, source.name, key)
        return Picture(data, _clip_extension(source.name, data), clip, 1, (clip.width, clip.height))
    suffix = _by_signature(data)
    if suffix not in IMAGE_EXTENSIONS:
        raise MediaError(key, "not_an_image", f"{shown(source.name)} begins {data[:16]!r}: no known picture format")
    media = probe_image(data, source.name, key)
    if media.width * media.height > MediaConfig.max_source_pixels:
        pixels = f"{media.width} x {media.height} pixels"
        raise MediaError(
            key, "too_many_pixels", f"{shown(source.name)} has {pixels}, limit {MediaConfig.max_source_pixels}"
        )
    if max(media.width, media.height) > MAX_ASPECT_RATIO * min(media.width, media.height):
        shape = f"{media.width} x {media.height} pixels"
        raise MediaError(key, "bad_aspect", f"{shown(source.name)}, {shape}: no side may be 200 times the other")
    orientation = image_orientation(data, key)
    if orientation == 1 and verify:
        decode_image(data, key, MediaConfig.max_source_pixels)
    if orientation == 1:
        return Picture(data, suffix, media, 1, (media.width, media.height))
    return _turned(data, suffix, media, orientation, key)


def place(picture: Picture, points: Box, source: MediaSource, key: str) -> Box:
    """Coordinates (x, y, x, y, ...) of the source as pixels of the stored picture.

    Coordinates count on the unturned pixels, as files store them, unless the source declares the displayed size.

    Raises:
        MediaError: reason "size_mismatch", where the declared size is neither: the coordinates belong to another
            picture or scale.
    """
    displayed, declared = picture.size, source.size
    if source.relative:
        return tuple(value * displayed[i % 2] for i, value in enumerate(points))
    if declared not in (None, displayed, picture.source_size):
        raise MediaError(
            key, "size_mismatch", f"annotated for {declared}, the picture is {displayed}: boxes cannot be placed"
        )
    if picture.orientation == 1 or (declared == displayed != picture.source_size):
        return points
    width, height = picture.source_size
    moved: list[float] = []
    for x, y in zip(points[0::2], points[1::2], strict=True):
        moved += _turn_point(x, y, width, height, picture.orientation)
    if len(points) == 4:  # a box: its corners may have changed places
        x1, x2 = sorted(moved[0::2])
        y1, y2 = sorted(moved[1::2])
        return (x1, y1, x2, y2)
    return tuple(moved)


def _turn_point(x: float, y: float, width: int, height: int, orientation: int) -> tuple[float, float]:
    """Where the point (x, y) of the unturned width x height picture lies after turning by the EXIF orientation."""
    if orientation >= 5:  # rows and columns change places first
        x, y, width, height = y, x, height, width
    if orientation in (3, 4, 7, 8):
        y = height - y
    if orientation in (2, 3, 6, 7):
        x = width - x
    return x, y


def media_bytes(source: MediaSource) -> int:
    """Size in bytes without reading (0 where the file is missing): for cutting an import into shards."""
    if source.data is not None:
        return len(source.data)
    if source.length is not None:
        return source.length
    try:
        return os.stat(source.path or "").st_size
    except OSError:
        return 0


def read_media(source: MediaSource, key: str) -> bytes:
    """The bytes of a medium.

    Raises:
        MediaError: missing, empty, cut, or over the limit of bytes.
    """
    if media_bytes(source) > MAX_MEDIA_BYTES:
        raise MediaError(
            key, "too_many_bytes", f"{shown(source.name)} has {media_bytes(source)} bytes, limit {MAX_MEDIA_BYTES}"
        )
    data = source.data
    if data is None:
        if source.path is None:
            raise MediaError(key, "missing_media", f"{shown(source.name)}: the source names no file")
        try:
            with open(source.path, "rb") as file:
                file.seek(source.offset)
                data = file.read() if source.length is None else file.read(source.length)
        except OSError as error:
            raise MediaError(key, "missing_media", f"{shown(source.name)}: {error.strerror}") from error
    if not data or (source.length is not None and len(data) != source.length):
        raise MediaError(key, "empty_media", f"{shown(source.name)} has {len(data)} bytes")
    return data


def _by_signature(data: bytes) -> str | None:
    return next((name for start, magic, name in _SIGNATURES if data[start : start + len(magic)] == magic), None)


def _clip_extension(name: str, data: bytes) -> str:
    """The member extension of a clip that was opened: its own where that is a clip's, else by content."""
    return extension(name) if extension(name) in VIDEO_EXTENSIONS else _by_signature(data) or "mp4"


def _turned(data: bytes, suffix: str, media: Media, orientation: int, key: str) -> Picture:
    """The picture with its orientation applied to the pixels, encoded again."""
    encoded = _encode(decode_image(data, key, MediaConfig.max_source_pixels), "JPEG" if suffix == "jpg" else "PNG")
    size = (media.height, media.width) if orientation >= 5 else (media.width, media.height)
    return Picture(encoded, "jpg" if suffix == "jpg" else "png", media, orientation, size)


def _encode(rgb: NDArray[np.uint8], form: str) -> bytes:
    buffer = io.BytesIO()
    if form == "JPEG":
        Image.fromarray(rgb).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()
