"""The demo data set: 20,000 pictures, clips and text, made from a seed in about a minute.

In:   counts and a seed.
Out:  a folder:
        train/captions-00000.tar …   picture + caption (+ the word): the image-text and OCR pairs of stage 1
        train/scenes-*.tar           picture + 3 to 5 turns: caption or grounded caption, referring, region, vqa, ocr
        train/ocr-*.tar              picture with a word: the word, the word with its quad, one referring question
        train/compare-*.tar          two pictures that differ in one shape + questions
        train/chat-*.tar             picture + a conversation, or a conversation alone
        train/clips-*.tar            mp4 + direction or order questions and a description
        train/text-*.tar             no media: the language of all of the above, arithmetic, facts
        heldout/TASK.tar             one question a record; `task` in the record is TASK
        texts.txt                    one text a line, to train a tokenizer on
        manifest.json                settings, counts, shards; written last
Cost: see `build_demo`. Train and held-out records come from different seeds.

A record is a pure function of (seed, split, kind, index) and a shard a fixed range of indices, so the bytes are the
same whatever the number of processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.shards.writer import MANIFEST_NAME, ShardFacts, ShardWriter, write_manifest
from data_pipelines.sources.demo_documents import HELDOUT_TASKS, TRAIN_KINDS, make_document
from data_pipelines.sources.demo_stencils import Stencils
from data_pipelines.sources.demo_texts import demo_texts

RECORDS_PER_SHARD = 500
TOKENIZER_TEXTS = 20_000

# Shares of the pictures; the rest are scenes. A record of "compare" holds two pictures.
PICTURE_SHARES = {"captions": 0.25, "ocr": 0.15, "compare": 0.08, "chat": 0.08}


@dataclass(frozen=True, slots=True)
class Unit:
    """One shard to be made: records `first` to `last` (exclusive) of `kind`."""

    split: str
    kind: str
    number: int
    first: int
    last: int


def build_demo(
    out: Path,
    *,
    num_pictures: int = 20_000,
    num_clips: int = 4_000,
    num_texts: int = 10_000,
    num_heldout: int = 200,
    seed: int = 0,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make the demo data in `out`, unless it is there already with the same settings and the same generator.

    `num_pictures` counts training pictures, `num_heldout` the records of each held-out task. `progress(done, total)` is
    called with finished records. The folder appears at once when everything is written; a build that was interrupted
    leaves only `.NAME.building` beside it, which the next build removes.

    Raises:
        ValueError: a count below 1, or `out` holds something that is no demo data set (it would be overwritten).
    """
    settings = {
        "generator": _generator_fingerprint(),
        "num_pictures": num_pictures,
        "num_clips": num_clips,
        "num_texts": num_texts,
        "num_heldout": num_heldout,
        "seed": seed,
    }
    for name in ("num_pictures", "num_clips", "num_texts", "num_heldout"):
        if settings[name] < 1:  # type: ignore[operator]
            raise ValueError(f"{name}={settings[name]}: the demo data needs at least 1")
    if processes < 1:
        raise ValueError(f"processes={processes}: give at least 1")
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        if _settings_of(out) == settings:
            return
        aside = out.with_name(f".{out.name}.building")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        units = _plan_units(num_pictures, num_clips, num_texts, num_heldout)
        shards = _write_units(aside, units, seed, processes, progress)
        _write_texts(aside / "texts.txt", demo_texts(seed, TOKENIZER_TEXTS))
        counts = {
            f"{kind}": sum(s.records for s in shards if Path(s.path).name.startswith(f"{kind}-"))
            for kind in TRAIN_KINDS
        }
        content = {"settings": settings, "records": counts, "shards": [asdict(shard) for shard in shards]}
        write_manifest(aside / MANIFEST_NAME, content)
        if out.exists():
            _remove_old(out)
        aside.rename(out)


def _settings_of(out: Path) -> dict[str, Any] | None:
    """Settings of the demo data set in `out`; None where there is none.

    Raises:
        ValueError: `out` exists, is not empty, and was not made here.
    """
    if not out.exists():
        return None
    try:
        settings = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))["settings"]
        if "generator" in settings:
            return dict(settings)
    except (OSError, ValueError, KeyError, TypeError):
        if out.is_dir() and not any(out.iterdir()):
            return None
    raise ValueError(f"{out} holds other data than a demo data set: name another folder, or move it away")


def _remove_old(out: Path) -> None:
    """Remove a demo data set made with other settings; under another name first, so that no half of it is ever seen."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    shutil.rmtree(old)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """One build at a time for a folder; a second one waits and finds the data made. Freed when the process dies."""
    with open(out.with_name(f".{out.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _generator_fingerprint() -> str:
    """A hash of the modules that decide the bytes, so that data of an older generator is made anew."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*sorted(folder.glob("demo*.py")), folder.parent / "shards" / "writer.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _plan_units(num_pictures: int, num_clips: int, num_texts: int, num_heldout: int) -> list[Unit]:
    """All shards to be made, the slow ones first so that the processes end together."""
    records = {kind: int(num_pictures * share) for kind, share in PICTURE_SHARES.items() if kind in TRAIN_KINDS}
    records["scenes"] = num_pictures - sum(records.values())
    if "compare" in records:
        records["compare"] //= 2
    records = {"clips": num_clips, **records, "text": num_texts}
    units = [
        Unit("train", kind, first // RECORDS_PER_SHARD, first, min(first + RECORDS_PER_SHARD, count))
        for kind, count in records.items()
        for first in range(0, count, RECORDS_PER_SHARD)
    ]
    return [*units, *(Unit("heldout", task, 0, 0, num_heldout) for task in HELDOUT_TASKS)]


def _write_units(
    folder: Path, units: list[Unit], seed: int, processes: int, progress: Callable[[int, int], None] | None
) -> list[ShardFacts]:
    """Make all shards; facts in the order of `units`."""
    total, done = sum(unit.last - unit.first for unit in units), 0
    facts: dict[Unit, ShardFacts] = {}
    for unit, fact in _run(folder, units, seed, processes):
        facts[unit] = fact
        done += unit.last - unit.first
        if progress is not None:
            progress(done, total)
    return [facts[unit] for unit in units]


def _run(folder: Path, units: list[Unit], seed: int, processes: int) -> Iterator[tuple[Unit, ShardFacts]]:
    if processes == 1:
        yield from ((unit, _write_unit(folder, unit, seed)) for unit in units)
        return
    # "spawn": the caller may hold threads (torch), which fork would copy in any state.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_write_unit, folder, unit, seed): unit for unit in units}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_unit(folder: Path, unit: Unit, seed: int) -> ShardFacts:
    """Make one shard: train/KIND-00000.tar or heldout/TASK.tar."""
    stencils = Stencils()
    target = folder / unit.split
    writer = ShardWriter(target, unit.kind, first_shard=unit.number, manifest=None)
    with writer:
        for index in range(unit.first, unit.last):
            document = make_document(seed, unit.split, unit.kind, index, stencils)
            writer.write(document.key, document.record, document.media)
    (shard,) = writer.shards
    name = shard.path
    if unit.split == "heldout":
        name = f"{unit.kind}.tar"
        (target / shard.path).rename(target / name)
    return ShardFacts(f"{unit.split}/{name}", shard.records, shard.bytes)


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for words in texts:
            file.write(words.replace("\n", " ") + "\n")
