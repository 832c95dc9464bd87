"""Visual Genome region descriptions → documents that ask what is in a box and where a phrase is.

Format (visualgenome.org/api): region_descriptions.json, [{"id": image id, "regions": [{"x", "y", "width", "height",
"phrase"}]}]; image_data.json (optional), [{"image_id", "width", "height"}], checks that boxes belong to the pictures at
hand. Pictures lie in VG_100K and VG_100K_2. Every region is asked for its phrase; a phrase that one region alone has is
asked for its place (Qwen-VL's "grounded captioning" and "referring grounding").
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.decode.fields import fail, mapping, number, sequence, text
from data_pipelines.decode.written_record import declared_size
from data_pipelines.errors import DataError, MediaError, RecordError
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, Labelled, MediaSource, problem
from data_pipelines.sources.json_files import read_json

HELP = "Visual Genome region descriptions: box → phrase and phrase → box"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import visual-genome`."""
    parser.add_argument("regions", type=Path, metavar="JSON", help="region_descriptions.json")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of the pictures (VG_100K VG_100K_2)",
    )
    parser.add_argument("--image-data", type=Path, metavar="JSON", help="image_data.json: the annotated sizes")
    parser.add_argument("--max-regions", type=int, default=0, metavar="N", help="at most N regions a picture (0: all)")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_visual_genome(options.regions, options.images, options.image_data, options.max_regions)


def read_visual_genome(
    path: Path, folders: Sequence[Path], image_data: Path | None = None, max_regions: int = 0
) -> Entries:
    """One item a picture. Of its usable regions the first `max_regions` stay; a broken one is a ledger line."""
    sizes = {} if image_data is None else _sizes(image_data)
    pictures = sequence(path.name, "file", read_json(path))
    yield Expected(len(pictures))
    for i, value in enumerate(pictures):
        key = f"picture-{i:07d}"
        try:
            entry = mapping(key, f"[{i}]", value)
            named = entry.get("id", entry.get("image_id"))
            if isinstance(named, bool) or not isinstance(named, int):
                fail(key, "id", named, "needs an integer", "no_media")
            key = f"{named:07d}"
            regions: list[Labelled] = []
            for j, region in enumerate(sequence(key, "regions", entry.get("regions"))):
                try:
                    regions.append(_region(key, f"regions[{j}]", region))
                except RecordError as error:
                    yield problem(f"{key}: regions[{j}]", error.reason, error.message)
            yield _item(key, named, regions[:max_regions] if max_regions else regions, folders, sizes.get(named))
        except DataError as error:
            yield problem(key, error.reason, error.message)


def _region(key: str, field: str, value: object) -> Labelled:
    region = mapping(key, field, value)
    x, y, width, height = (
        number(key, f"{field}.{side}", region.get(side), -1e6, 1e6, "bad_box") for side in ("x", "y", "width", "height")
    )
    return Labelled(text(key, f"{field}.phrase", region.get("phrase")).strip(), ((x, y, x + width, y + height),))


def _item(
    key: str, image_id: int, regions: Sequence[Labelled], folders: Sequence[Path], size: tuple[int, int] | None
) -> Item:
    counts = Counter(region.phrase.lower() for region in regions)
    single = tuple(region for region in regions if counts[region.phrase.lower()] == 1)
    picture = _find(f"{image_id}.jpg", folders, key)
    media = (MediaSource(picture.name, "image", picture, size=size),)
    return Item(key, Annotations(regions=tuple(regions), referring=single), media)


def _find(name: str, folders: Sequence[Path], key: str) -> Path:
    for folder in folders:
        try:
            return resolve_media(name, folder, None, key)
        except MediaError:
            continue
    raise MediaError(key, "missing_media", f"{name} is in none of {', '.join(str(folder) for folder in folders)}")


def _sizes(path: Path) -> dict[int, tuple[int, int]]:
    sizes = {}
    for entry in sequence(path.name, "file", read_json(path)):
        if isinstance(entry, dict) and isinstance(entry.get("image_id"), int) and (size := declared_size(entry)):
            sizes[entry["image_id"]] = size
    return sizes
