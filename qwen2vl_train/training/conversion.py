"""DeepSpeed's universal checkpoint: one folder per parameter, from which any number of ranks can load.

Enters: a checkpoint's folder. Leaves: the converted one, whole or absent. Costs time in proportion to the checkpoint
and, for a while, twice its room: DeepSpeed writes every rank's fragments before it merges them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from data_pipelines.errors import UserError


class ConversionError(UserError):
    """A checkpoint that could not be converted; nothing is left of the attempt."""


def convert(path: Path, converted: Path) -> None:
    """DeepSpeed's shards in `path`/engine → one folder per parameter in `converted`/engine.

    Raises:
        ConversionError: no room for it, told before anything is written, or DeepSpeed's converter failed.
    """
    shutil.rmtree(converted, ignore_errors=True)
    _check_room(path, converted.parent)
    converted.mkdir()
    places = ["--input_folder", str(path / "engine"), "--output_folder", str(converted / "engine")]
    # one worker each: more processes raced on folders they both create, and conversion is bound by the disk
    settings = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    # stages 1 and 2: it adds the version of the form alone, which only Megatron's engines leave themselves
    settings.append("--inject_missing_state")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *places, *settings]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if answer.returncode:
        shutil.rmtree(converted, ignore_errors=True)  # a full disk would stay full
        raise ConversionError(answer.stderr[-2000:].strip())


def _check_room(path: Path, parent: Path) -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    free = shutil.disk_usage(parent).free
    if free < 2 * size:
        raise ConversionError(
            f"{parent} has {free / 1e9:.2f} GB free, the conversion takes about {2 * size / 1e9:.2f} for a while; make "
            "room and start the same command again"
        )
