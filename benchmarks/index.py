"""The index of a large data set: time to build and to open it, and the memory that it costs each worker.

    python -m benchmarks.index [--samples 1000000] [--shards 1000] [--workers 4]

The side files are written by the index's own writer, for shards whose tars are empty: captions of one picture each,
sizes and keys from a seed. "Opened" is what a run does before its first pack is planned, in a process of its own. Then
workers are forked and walk every column, first of one shard, then of all; by what each grew in between is read from
/proc/PID/smaps, with all of them alive. The last line is JSON.
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
from typing import Any, TypeVar

import numpy as np

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.index.build import Counting
from data_pipelines.index.samples import IndexRow, ShardIndex, index_columns
from data_pipelines.index.side_files import keep_side_file
from data_pipelines.index.source import SourceIndex
from data_pipelines.loader import new_planner, open_sources
from data_pipelines.samples import Media, MediaRef
from data_pipelines.shards.storage import open_shard
from data_pipelines.shards.tar import Member
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")
FIELDS = ("Private", "Pss", "index Rss", "index Pss", "index Private")


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
    each = {field: round(statistics.mean(worker[field] for worker in grown)) for field in FIELDS}
    summary = {
        "samples": args.samples,
        "shards": args.shards,
        "index_bytes_per_sample": round(size / args.samples, 1),
        "build_us_per_sample": round(build_us, 2),
        "open_first_ms": round(first[0], 1),
        "open_ms": round(statistics.median(ms for ms, _ in later), 1),
        "first_pack_ms": round(statistics.median(ms for _, ms in later), 1),
        "private_bytes_per_worker": each["Private"],
        "pss_bytes_per_worker": each["Pss"],
        "private_index_bytes_per_worker": each["index Private"],
    }
    print(json.dumps(summary))


def write_index(folder: Path, counting: Counting, num_samples: int, num_shards: int) -> int:
    """Tars without members, and the side files of `num_samples` captions; returns the bytes of these."""
    rng = np.random.default_rng(0)
    each = num_samples // num_shards
    nothing = {"problems": [], "unlisted": {}}
    for number in range(num_shards):
        path = folder / f"s-{number:05d}.tar"
        path.write_bytes(number.to_bytes(512, "little") + bytes(9728))
        file = open_shard(str(path))
        arrays, meta = index_columns(captions(number, each, rng))
        index = ShardIndex(keep_side_file(file, "index", {}, (arrays, meta | nothing | {"content": ""})))
        text = {"tokens": rng.integers(8, 200, each, np.int32), "truncatable": np.zeros(each, np.uint8)}
        keep_side_file(file, f"text-{counting.name}", {"rows": index.fingerprint}, (text, nothing))
        file.close()
    return sum(path.stat().st_size for path in (folder / ".index").iterdir())


def captions(shard: int, count: int, rng: np.random.Generator) -> list[IndexRow]:
    """Samples of a record and a picture each, as a scan would find them."""
    rows = []
    for row, (width, height) in enumerate(rng.integers(100, 3000, (count, 2)).tolist()):
        members = {"json": Member(row << 18, 200, row), "0.jpg": Member((row << 18) + 1024, 200_000, row)}
        media = [(Media("0.jpg", "image", width, height), MediaRef("0.jpg"))]
        rows.append(IndexRow(f"simulated/{shard:05d}/{row:06d}", "caption", members, media))
    return rows


def time_to_open(config: DataConfig, tokenizer: TextTokenizer) -> tuple[float, float]:
    """Milliseconds until the sources are open and identified, and from there to the first planned pack."""
    start = time.perf_counter()
    sources = open_sources(config, tokenizer)
    _ = [source.fingerprint for source in sources]
    opened = time.perf_counter()
    new_planner(config, sources, seed=0).next_pack()
    return (opened - start) * 1e3, (time.perf_counter() - opened) * 1e3


def growth_of_workers(config: DataConfig, tokenizer: TextTokenizer, count: int) -> list[dict[str, int]]:
    """Bytes by which each of `count` forked workers grew from one shard walked to all, all of them alive."""
    sources = open_sources(config, tokenizer)
    barrier = FORK.Barrier(count + 1)
    workers = [FORK.Process(target=walk, args=(sources, barrier), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    barrier.wait()
    before = [memory_of(worker.pid) for worker in workers]
    barrier.wait()
    barrier.wait()
    after = [memory_of(worker.pid) for worker in workers]
    barrier.wait()
    for worker in workers:
        worker.join()
    return [{name: now[name] - then[name] for name in FIELDS} for then, now in zip(before, after, strict=True)]


def walk(sources: list[SourceIndex], barrier: Any) -> None:
    """A worker's life: touch every column of one shard, be measured, then those of all shards, be measured again.

    What one shard costs, the program itself does: a worker copies the pages whose objects it counts references of.
    """
    for first_only in (True, False):
        for source in sources:
            for shard in range(1 if first_only else source.num_shards):
                table = source.table(shard)
                for array in (*table.index.arrays.values(), table.text_tokens, table.truncatable):
                    array.max(initial=0)
        barrier.wait()
        barrier.wait()


def memory_of(pid: int | None) -> dict[str, int]:
    """Bytes of a process by /proc/PID/smaps: all that is its own, its share of all, and the same of mapped indices."""
    found, index = dict.fromkeys(FIELDS, 0), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # the head of a mapping, with its file
            index = "/.index/" in line
            continue
        field = "Private" if name in ("Private_Clean:", "Private_Dirty:") else name[:-1]
        for key in (field, f"index {field}") if index else (field,):
            if key in found:
                found[key] += int(rest[0]) * 1024
    return found


def in_a_process(work: Callable[[], T]) -> T:
    """The result of `work` in a process of its own: nothing is open or cached there."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: theirs.send(work()))
    process.start()
    theirs.close()
    result: T = ours.recv()
    process.join()
    return result


if __name__ == "__main__":
    main()
