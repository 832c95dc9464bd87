"""Duplicates among the items of an import: equal bytes and texts, and pictures that look alike.

Enters: the stream of items. Leaves: the stream without later duplicates (the first of equals stays), each counted and
told in the ledger. Costs one reading of the media and, for near duplicates, a decoding at an eighth of the size; memory
about 200 bytes an item, for as long as the import runs.

The perceptual hash is the common one: grey, 32 x 32, cosine transform, its 8 x 8 lowest frequencies (without the
constant) compared with their median, 63 bits. Pictures without structure have none: all of them would look alike. Two
hashes within `max_distance` bits are found through their bands: of max_distance + 1 bands at least one is equal.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_pipelines.config import MediaConfig
from data_pipelines.decode.image import FORMATS, probe_image
from data_pipelines.errors import DataError, UserError
from data_pipelines.sources.item import Entry, Item, problem
from data_pipelines.sources.pictures import read_media

HASH_BITS = 63
_SIDE = 32
_LOW = 8
_MIN_CONTRAST = 2.0


class SampleCount(Protocol):
    """Where the numbers of samples go."""

    samples_before: int
    samples_after: int


@dataclass(frozen=True)
class ExactDuplicates:
    """Drop items whose media bytes and annotations are those of an earlier one."""


@dataclass(frozen=True)
class NearDuplicates:
    """Drop items of one picture that looks like an earlier one's: hashes differ in at most `max_distance` bits of 63.

    With `same_text` only where the annotations are equal, too; otherwise other captions of a picture are lost.
    """

    max_distance: int = 3
    same_text: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 16:
            raise UserError(f"near_duplicates.max_distance = {self.max_distance}: needs 0..16")


def drop_duplicates(
    entries: Iterable[Entry], rule: ExactDuplicates | NearDuplicates, count: SampleCount
) -> Iterator[Entry]:
    """`entries` without later duplicates; `count` is told what came and what stayed."""
    exact: dict[bytes, str] = {}
    near = _HashIndex(rule.max_distance) if isinstance(rule, NearDuplicates) else None
    for entry in entries:
        if not isinstance(entry, Item):
            yield entry
            continue
        count.samples_before += 1
        if near is None:
            digest = _item_digest(entry, media=True)
            first = None if digest is None else exact.setdefault(digest, entry.key)
        else:
            first = _first_alike(entry, near, isinstance(rule, NearDuplicates) and rule.same_text)
        if first is None or first == entry.key:
            count.samples_after += 1
            yield entry
        else:
            name = "exact_duplicates" if near is None else "near_duplicates"
            yield problem(entry.key, name, f"duplicate of {first}")


def picture_hash(data: bytes, key: str) -> int | None:
    """The 63-bit perceptual hash of an encoded picture; None where it is all but one colour.

    Raises:
        MediaError: no picture; over the pixel limit. Pictures that do not decode raise `OSError`.
    """
    media = probe_image(data, key, key)
    if media.width * media.height > MediaConfig.max_source_pixels:
        raise OSError(f"{media.width} x {media.height} pixels")
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.draft("L", (2 * _SIDE, 2 * _SIDE))  # JPEG: decode at an eighth where that is enough
        grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.float64)
    if pixels.std() < _MIN_CONTRAST:
        return None
    basis = _cosines()
    low = (basis @ pixels @ basis.T).reshape(-1)[1:]
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _cosines() -> np.ndarray[Any, np.dtype[np.float64]]:
    """The lowest 8 rows of the 32-point cosine transform."""
    place = (2 * np.arange(_SIDE) + 1) * math.pi / (2 * _SIDE)
    return np.asarray(np.cos(np.arange(_LOW)[:, None] * place[None, :]))


class _HashIndex:
    """Hashes with their keys; finds one within a distance."""

    def __init__(self, distance: int) -> None:
        self._distance = distance
        bands = distance + 1
        cuts = [HASH_BITS * i // bands for i in range(bands + 1)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(cuts)]
        self._tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._bands]
        self._hashes: list[int] = []
        self._keys: list[tuple[str, bytes]] = []

    def find(self, value: int, text: bytes) -> str | None:
        """The key of the earliest hash within the distance, with the same `text` tag."""
        found = [
            number
            for (low, mask), table in zip(self._bands, self._tables, strict=True)
            for number in table.get((value >> low) & mask, ())
            if (self._hashes[number] ^ value).bit_count() <= self._distance and self._keys[number][1] == text
        ]
        return self._keys[min(found)][0] if found else None

    def add(self, value: int, key: str, text: bytes) -> None:
        """Remember a hash."""
        number = len(self._hashes)
        self._hashes.append(value)
        self._keys.append((key, text))
        for (low, mask), table in zip(self._bands, self._tables, strict=True):
            table[(value >> low) & mask].append(number)


def _first_alike(item: Item, near: _HashIndex, same_text: bool) -> str | None:
    """The key of an earlier item that looks alike; None where there is none, or the item is not one picture."""
    if len(item.media) != 1 or item.media[0].kind != "image":
        return None
    try:
        value = picture_hash(read_media(item.media[0], item.key), item.key)
    except (DataError, OSError, SyntaxError, ValueError):
        return None  # what is wrong with the picture is told when it is imported
    if value is None:
        return None
    text = (_item_digest(item, media=False) or b"") if same_text else b""
    first = near.find(value, text)
    if first is None:
        near.add(value, item.key, text)
    return first


def _item_digest(item: Item, media: bool) -> bytes | None:
    """A hash of the annotations and, with `media`, of the media's bytes; None where a medium cannot be read."""
    digest = hashlib.blake2b(repr(item.annotations).encode("utf-8", "surrogatepass"), digest_size=16)
    for source in item.media if media else ():
        try:
            digest.update(hashlib.blake2b(read_media(source, item.key), digest_size=16).digest())
        except DataError:
            return None
    return digest.digest()
