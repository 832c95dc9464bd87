"""Where side files lie: beside their shard, or in this user's cache where the shard's folder cannot be written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from data_pipelines.shards.names import is_remote, public_name, split_name

SPARE_CACHE = Path("~/.cache/qwen2vl-train/index")


def side_places(shard: str, kind: str) -> list[Path]:
    """Where the side file `kind` of `shard` may lie, the best place first; of a remote shard only in the cache."""
    shard, root = split_name(shard)
    if root:  # the same lines with media in another folder have an index of their own
        kind = f"{hashlib.blake2b(root.encode(), digest_size=4).hexdigest()}.{kind}"
    where = public_name(shard) if is_remote(shard) else str(Path(shard).resolve())
    name = f"{os.path.basename(where)}.{kind}"
    digest = hashlib.blake2b(where.encode(), digest_size=8).hexdigest()
    spare = SPARE_CACHE.expanduser() / f"{digest}-{name}"
    return [spare] if is_remote(shard) else [Path(where).parent / ".index" / name, spare]
