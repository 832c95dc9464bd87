"""Pictures in folders by class → documents that ask for the class (ImageFolder form: DIR/CLASS/picture).

With --names a JSON object {folder: name} gives the classes' names (ImageNet's synsets); "_" in names becomes a space.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipelines.decode.fields import mapping, text
from data_pipelines.errors import DataError, RecordError
from data_pipelines.shards.media_files import resolve_media
from data_pipelines.sources.inputs import media_in
from data_pipelines.sources.item import Annotations, Entries, Expected, Item, MediaSource, problem
from data_pipelines.sources.json_files import read_json
from data_pipelines.sources.keys import key_of

HELP = "pictures in one folder per class (ImageNet, ImageFolder)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `import classes`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that holds one folder per class")
    parser.add_argument("--names", type=Path, metavar="JSON", help="{folder: class name}")


def read(options: argparse.Namespace) -> Entries:
    """The items that the options name."""
    yield from read_classes(options.folder, options.names)


def read_classes(folder: Path, names: Path | None) -> Entries:
    """One item a picture, class by class in order of their names."""
    if not folder.is_dir():
        raise RecordError(str(folder), "missing_file", "is no folder")
    called = {} if names is None else mapping(names.name, "names", read_json(names))
    groups = sorted(path for path in folder.iterdir() if path.is_dir())
    for number, group in enumerate(groups):
        pictures = media_in(group, "image")
        yield Expected(len(pictures), 1 / len(groups))
        for count, path in enumerate(pictures):
            key = f"{number:04d}-{key_of(group.name)}/{count:06d}-{key_of(path.stem)}"
            try:
                label = text(key, "names", called.get(group.name, group.name)).replace("_", " ")
                image = resolve_media(f"{group.name}/{path.name}", folder, None, key)
                yield Item(key, Annotations(label=label), (MediaSource(path.name, "image", image),), "classification")
            except DataError as error:
                yield problem(key, error.reason, error.message)
