"""Keys of samples from names of sources: what a tar can hold and a ledger reader can find again."""

from __future__ import annotations

import re

_ODD = re.compile(r"[^A-Za-z0-9_\-]+")
MAX_KEY_CHARACTERS = 80


def key_of(name: str) -> str:
    """`name` with everything but letters, digits, "-" and "_" replaced: "receipt 1.v2" is "receipt_1_v2".

    Different names may come out alike: callers add a number where names are not their own.
    """
    return _ODD.sub("_", name).strip("_")[:MAX_KEY_CHARACTERS] or "item"
