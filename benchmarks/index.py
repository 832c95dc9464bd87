"""The index of a large data set: time to build and to open it, and the memory that it costs each worker.

    python -m benchmarks.index [--samples 1000000] [--shards 1000] [--workers 4]

The side files are written by the index's own writer, for shards whose tars are empty: captions of one picture each,
sizes and keys from a seed. "Opened" is what a run does before its first pack is planned, in a process of its own. Then
workers are forked, walk every column of every shard, and wait; the growth of each since its fork is read from
/proc/PID/smaps_rollup, with all of them alive. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.index.build import Counting, write_side_files
from data_pipelines.index.samples import IndexRow, index_columns
from data_pipelines.index.source import SourceIndex
from data_pipelines.loader import new_planner, open_sources
from data_pipelines.samples import Media, MediaRef
from data_pipelines.shards.storage import open_shard
from data_pipelines.shards.tar import Member
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer

FORK = multiprocessing.get_context("fork")
FIELDS = ("Pss", "Private_Clean", "Private_Dirty", "Anonymous")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="times that the data set is opened; the median counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_bpe(["a picture of many colours and shapes"] * 9, folder / "tokenizer", vocab_size=300)
        tokenizer = TextTokenizer(folder / "tokenizer")
        start = time.process_time()
        size = write_index(folder, Counting(tokenizer, "plain"), args.samples, args.shards)
        build_us = (time.process_time() - start) / args.samples * 1e6
        print(f"{args.samples:,} samples in {args.shards:,} shards: {size / args.samples:.0f} bytes a sample")
        config = DataConfig({"simulated": SourceConfig((f"{folder}/s-*.tar",))})
        first, *later = (in_a_process(lambda: time_to_open(config, tokenizer)) for _ in range(1 + args.rounds))
        print(f"opened for the first time {first[0]:.1f} ms, later {', '.join(f'{ms:.1f}' for ms, _ in later)} ms")
        grown = in_a_process(lambda: growth_of_workers(config, tokenizer, args.workers))
    for field in FIELDS:
        print(f"{field:14}" + "  ".join(f"{worker[field] / 1024:9.0f} KiB" for worker in grown))
    private = [worker["Private_Clean"] + worker["Private_Dirty"] for worker in grown]
    summary = {
        "samples": args.samples,
        "shards": args.shards,
        "index_bytes_per_sample": round(size / args.samples, 1),
        "build_us_per_sample": round(build_us, 2),
        "open_first_ms": round(first[0], 1),
        "open_ms": round(statistics.median(ms for ms, _ in later), 1),
        "first_pack_ms": round(statistics.median(ms for _, ms in later), 1),
        "private_bytes_per_worker": round(statistics.mean(private)),
        "pss_bytes_per_worker": round(statistics.mean(worker["Pss"] for worker in grown)),
    }
    print(json.dumps(summary))


def write_index(folder: Path, counting: Counting, num_samples: int, num_shards: int) -> int:
    """Shards without content, and the side files of `num_samples` captions; returns the bytes of these."""
    rng = np.random.default_rng(0)
    each = num_samples // num_shards
    for number in range(num_shards):
        path = folder / f"s-{number:05d}.tar"
        path.write_bytes(number.to_bytes(512, "little") + bytes(9728))
        arrays, meta = index_columns(rows_of(number, each, rng))
        text = {"tokens": rng.integers(8, 200, each).astype(np.int32), "truncatable": np.zeros(each, np.uint8)}
        with_file = open_shard(str(path))
        write_side_files(with_file, counting, (arrays, meta), (text, {}))
        with_file.close()
    return sum(path.stat().st_size for path in (folder / ".index").iterdir())
