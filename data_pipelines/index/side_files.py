"""Side files of shards: where one is found, when it still belongs to its shard, how it is kept.

Enters: an open shard. Leaves: mapped columns that belong to its content, by format, size and content tag. A side file
also notes the time of a local shard's last change, as a hint alone: where that differs, size and tag are not believed,
and the index is compared with the shard's headers and records (see `build`). Costs about 0.3 ms a look.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.index.places import side_places
from data_pipelines.index.samples import FORMAT
from data_pipelines.index.table import Array, ColumnError, Columns, write_columns
from data_pipelines.shards.names import is_remote
from data_pipelines.shards.storage import ShardFile, read_beside
from data_pipelines.whole import write_whole

Built = tuple[Mapping[str, Array], Mapping[str, Any]]


def find_side_file(file: ShardFile, kind: str, facts: Mapping[str, Any], published: bool = True) -> Columns | None:
    """The side file `kind` that belongs to this size, tag and `facts`, best one that also has the shard's time.

    Of a remote shard also one that was uploaded with it (`.index/` beside it), unless `published` is off.
    """
    identity = {**_identity(file), **facts}
    found = _find(file, kind, identity)
    if found is None and published and is_remote(file.name):
        data = read_beside(file, f".index/{os.path.basename(file.name)}.{kind}")
        if data is not None:
            (path,) = _places(file, kind)
            write_whole(path, data)
            found = _find(file, kind, identity)
    return found


def has_time_of(columns: Columns, file: ShardFile) -> bool:
    """Whether the shard was last changed when the side file says; of remote ones, tag and version tell."""
    return is_remote(file.name) or columns.meta.get("time_ns") == file.time_ns


def keep_side_file(file: ShardFile, kind: str, facts: Mapping[str, Any], built: Built) -> Columns:
    """Write what was built where it belongs, with what says which content and `facts` it belongs to."""
    arrays, meta = built
    described = {**meta, **_identity(file), **facts, "time_ns": file.time_ns}
    *beside, spare = _places(file, kind)
    for path in beside:
        with suppress(OSError):  # a read-only data set
            write_columns(path, arrays, described)
            return Columns(path)
    write_columns(spare, arrays, described)
    return Columns(spare)


def _identity(file: ShardFile) -> dict[str, Any]:
    """What says that a side file belongs to this content."""
    return {"format": FORMAT, "size": file.size, "tag": file.tag()}


def _places(file: ShardFile, kind: str) -> list[Path]:
    """Where the side file may lie; shards that share a name (`get?id=1`, `get?id=2`) have their own by their tags."""
    return side_places(file.name, f"{file.tag()}.{kind}" if file.shares_name else kind)


def _find(file: ShardFile, kind: str, identity: Mapping[str, Any]) -> Columns | None:
    found = []
    for path in _places(file, kind):
        with suppress(ColumnError):
            columns = Columns(path)
            if all(columns.meta.get(name) == value for name, value in identity.items()):
                if has_time_of(columns, file):
                    return columns
                found.append(columns)
    return found[0] if found else None
