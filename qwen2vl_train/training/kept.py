"""The JSON files that a run keeps beside its results: written whole, and named where one is damaged.

A power cut or a full disk elsewhere (a copy, a synchronised folder) leaves halves; a person must know of which file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.whole import write_whole


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that the file is old or new, never half."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: there is none: a damaged file. The message names it and `remedy`.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object): {remedy}")
    return value
