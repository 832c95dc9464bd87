"""Image bytes → facts (from the header) and RGB pixels.

Enters: the bytes of one stored image, in any of JPEG, PNG, WebP, GIF, BMP, TIFF (by content; names are not trusted).
Leaves: `Media` facts without decoding, or uint8 [H, W, 3]. One policy for all formats: EXIF orientation is applied,
alpha is laid on white, 16-bit and float images are scaled to 8 bits, of several frames or pages the first counts,
colour profiles are ignored. Pixels are budgeted from the header before anything is decoded.

JPEG goes through simplejpeg (1.6 times Pillow's speed, the same pixels), which reports damage that other decoders paint
grey; only what it cannot convert goes to Pillow. Pillow is held to the six formats above: some of its other plugins
start programs (EPS starts Ghostscript). A damaged image is an error, never a half-grey picture.
Cost: 8 us for a JPEG header; about 4 ms per megapixel of JPEG.
"""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.errors import MediaError
from data_pipelines.samples import Media

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEG_MAGIC = b"\xff\xd8\xff"
_ORIENTATION_TAG = 0x0112
# Frame headers carry the size: SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# libjpeg's warnings about bytes that it skipped without losing a pixel; Pillow, too, accepts such files.
_HARMLESS = ("extraneous bytes before marker", "Inconsistent progression sequence", "Invalid SOS parameters")
_UNSUPPORTED = ("CMYK", "YCCK", "colorspace", "conversion", "Unsupported")


def probe_image(data: bytes, name: str, key: str) -> Media:
    """Facts of the image `data` (member `name` of sample `key`) from its header, width and height as displayed.

    Raises:
        MediaError: "empty_media", "not_an_image", "too_many_pixels" (over Pillow's own bomb limit), "bad_size".
    """
    _require_bytes(data, key)
    if data.startswith(_JPEG_MAGIC):
        height, width, orientation = _jpeg_header(data, key)
    else:
        with _open(data, key) as image:
            width, height = image.size
            orientation = _pillow_orientation(image)
    if width < 1 or height < 1:
        raise MediaError(key, "bad_size", f"image {name!r} says {width} x {height} pixels")
    if orientation >= 5:
        width, height = height, width
    return Media(name, "image", width, height)


def image_orientation(data: bytes, key: str) -> int:
    """EXIF orientation 1..8 that a reader of the stored pixels still has to apply; from the header.

    Raises:
        MediaError: as `probe_image`.
    """
    _require_bytes(data, key)
    if data.startswith(_JPEG_MAGIC):
        return _jpeg_header(data, key)[2]
    with _open(data, key) as image:
        return _pillow_orientation(image)


def decode_image(data: bytes, key: str, max_source_pixels: int) -> NDArray[np.uint8]:
    """Pixels of `data`, uint8 [H, W, 3] RGB as displayed, C-contiguous. At most `max_source_pixels` are decoded.

    Raises:
        MediaError: as `probe_image`; "too_many_pixels" before any decoding; "corrupt_image" when data is damaged or
            ends early; "unsupported_pixels" when values have no defined range (floats outside 0..255).
    """
    _require_bytes(data, key)
    if data.startswith(_JPEG_MAGIC):
        return _decode_jpeg(data, key, max_source_pixels)
    return _decode_pillow(data, key, max_source_pixels)


def _decode_jpeg(data: bytes, key: str, max_source_pixels: int) -> NDArray[np.uint8]:
    height, width, orientation = _jpeg_header(data, key)
    _check_pixels(width, height, key, max_source_pixels)
    try:
        rgb = np.asarray(simplejpeg.decode_jpeg(data, "RGB"), dtype=np.uint8)
    except (ValueError, RuntimeError, MemoryError) as error:
        message = str(error)
        if not any(words in message for words in _HARMLESS + _UNSUPPORTED):
            raise MediaError(key, "corrupt_image", f"JPEG does not decode: {message}") from error
        return _decode_pillow(data, key, max_source_pixels)
    return _turn(rgb, orientation)


def _decode_pillow(data: bytes, key: str, max_source_pixels: int) -> NDArray[np.uint8]:
    with _open(data, key) as image:
        _check_pixels(*image.size, key, max_source_pixels)
        orientation = _pillow_orientation(image)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # palette images with byte transparency warn, and are handled here
                image.load()
                rgb = _to_rgb(image, key)
        except MediaError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly every type on damaged data
            raise MediaError(key, "corrupt_image", f"{image.format} does not decode: {error}") from error
    return _turn(rgb, orientation)


def _to_rgb(image: Image.Image, key: str) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of a loaded image of any Pillow mode, not yet turned."""
    if image.mode == "F":
        return _grey_to_rgb(_scale_float(np.asarray(image), key))
    if image.mode.startswith("I"):  # 16-bit grey ("I;16", "I;16B", or widened to 32-bit "I"): 65535 is white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise MediaError(key, "unsupported_pixels", f"integers {values.min()}..{values.max()} are not 16-bit grey")
        return _grey_to_rgb(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, picture)
    return np.array(image.convert("RGB"), dtype=np.uint8)  # a copy: what asarray gives is read-only


def _scale_float(values: NDArray[np.float32], key: str) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 255.0):  # NaN fails too
        raise MediaError(key, "unsupported_pixels", f"float pixels {low}..{high}; expected 0..1 or 0..255")
    factor = 255.0 if high <= 1.0 else 1.0
    scaled: NDArray[np.uint8] = np.rint(values * factor).astype(np.uint8)
    return scaled


def _grey_to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _turn(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply an EXIF orientation: 2..4 mirror, 5..8 also swap the axes; 1 leaves the pixels alone, without a copy."""
    if orientation >= 5:
        rgb = np.swapaxes(rgb, 0, 1)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def _jpeg_header(data: bytes, key: str) -> tuple[int, int, int]:
    """Stored (height, width, EXIF orientation) of a JPEG, by walking its markers up to the frame header."""
    orientation = 1
    position, end = 2, len(data)
    while position + 9 <= end:
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            position += 2
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, position + 5)
            if width < 1 or height < 1:
                raise MediaError(key, "bad_size", f"JPEG header says {width} x {height} pixels")
            return height, width, orientation
        if length < 2 or marker == 0xDA:  # entropy-coded data before any frame header
            break
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\x00\x00":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    raise MediaError(key, "not_an_image", f"JPEG without a frame header in {len(data)} bytes")


def _exif_orientation(block: bytes) -> int:
    """Orientation 1..8 in a TIFF-structured EXIF block; 1 where there is none or the block is garbage."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 14:
        return 1
    (directory,) = struct.unpack_from(order + "I", block, 4)
    if directory + 2 > len(block):
        return 1
    (count,) = struct.unpack_from(order + "H", block, directory)
    for entry in range(directory + 2, min(directory + 2 + 12 * count, len(block) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", block, entry)
        if tag == _ORIENTATION_TAG and kind == 3:
            (value,) = struct.unpack_from(order + "H", block, entry + 8)
            return int(value) if 1 <= value <= 8 else 1
    return 1


def _pillow_orientation(image: Image.Image) -> int:
    """EXIF orientation still to be applied; Pillow itself turns TIFF (and reports its size as displayed).

    Not by `getexif`: for PNG that decodes the whole picture, and a caller who forgives its errors would then get the
    half-decoded rest without one.
    """
    block = image.info.get("exif")
    if image.format == "TIFF" or not isinstance(block, bytes):
        return 1
    return _exif_orientation(block.removeprefix(b"Exif\x00\x00"))


def _open(data: bytes, key: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images warn; the caller's own limit decides
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(key, "too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly every type on damaged headers
        start = data[:16]
        raise MediaError(key, "not_an_image", f"no image header in bytes that begin {start!r} ({error})") from error


def _require_bytes(data: bytes, key: str) -> None:
    if not data:
        raise MediaError(key, "empty_media", "the image member has 0 bytes")


def _check_pixels(width: int, height: int, key: str, max_source_pixels: int) -> None:
    if width < 1 or height < 1:
        raise MediaError(key, "bad_size", f"image header says {width} x {height} pixels")
    if width * height > max_source_pixels:
        raise MediaError(
            key,
            "too_many_pixels",
            f"{width} x {height} = {width * height} pixels, over max_source_pixels={max_source_pixels}; "
            f"raise it or drop the sample",
        )
