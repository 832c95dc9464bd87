"""The demo data set: 30,000 pictures, clips, text and a tokenizer, made from a seed.

In:   counts and a seed.
Out:  a folder:
        train/captions-00000.tar …   picture + caption (+ its word): the image-text pairs of stage 1
        train/words-*.tar            picture with a word: the word; the OCR pairs of stage 1
        train/scenes-*.tar           picture + 2 to 6 turns: caption or grounded caption, referring, region, vqa, ocr
        train/ocr-*.tar              the same with a caption, a referring question and perhaps the word's quad
        train/compare-*.tar          two pictures that differ in one shape + three turns
        train/chat-*.tar             picture + a conversation; one in five without picture
        train/clips-*.tar            mp4 + direction or order questions and a description
        train/text-*.tar             no media: the language of all of the above, arithmetic, facts
        heldout/TASK-00000.tar       one question a record, the last answer counts; `task` in the record is TASK
        tokenizer/                   a byte-level BPE trained on texts of all training kinds
        manifest.json                settings, records, shards; written last
Cost: a minute on two cores and 250 MB for the default counts.

A record is a pure function of (seed, split, kind, index) and a shard a fixed range of indices, so the bytes are the
same whatever the number of processes. Train and held-out records come from different streams of the seed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_pipelines.errors import UserError
from data_pipelines.processes import map_in_processes
from data_pipelines.shards.writer import MANIFEST_NAME, ShardFacts, ShardWriter, write_manifest
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.sources.demo_documents import HELDOUT_TASKS, demo_texts, make_document
from data_pipelines.sources.demo_stencils import Stencils

RECORDS_PER_SHARD = 500
TOKENIZER_RECORDS = 1_000  # of each training kind

# Shares of the pictures, in records per picture; scenes take the rest. A record of "compare" holds two pictures.
RECORDS_PER_PICTURE = {"captions": 0.25, "words": 0.15, "ocr": 0.1, "compare": 0.04, "chat": 0.07}
PICTURES_PER_RECORD = {"compare": 2}


@dataclass(frozen=True)
class DemoSettings:
    """What decides the bytes of a demo data set. Counts are training pictures, clips and texts, and records a task."""

    num_pictures: int
    num_clips: int
    num_texts: int
    num_heldout: int
    vocab_size: int
    seed: int
    generator: str

    def __post_init__(self) -> None:
        for name in ("num_pictures", "num_clips", "num_texts", "num_heldout"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: the demo data needs at least 1")


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
    num_pictures: int = 30_000,
    num_clips: int = 5_000,
    num_texts: int = 10_000,
    num_heldout: int = 200,
    vocab_size: int = 2048,
    seed: int = 0,
    processes: int = 2,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make the demo data in `out`, unless it is there already with the same settings and the same generator.

    `num_pictures` counts training pictures, `num_heldout` the records of each held-out task. `progress(done)` is called
    with the training pictures and clips made so far, at the end num_pictures + num_clips. The folder appears at once
    when everything is written; a build that was interrupted leaves only `.NAME.building` beside it, which the next
    build removes. Demo data with other settings is replaced.

    Raises:
        UserError: a count below 1, a vocabulary that is too small, or `out` holds something other than demo data
            (which would be lost).
    """
    settings = DemoSettings(
        num_pictures, num_clips, num_texts, num_heldout, vocab_size, seed, generator=_generator_fingerprint()
    )
    if processes < 1:
        raise UserError(f"processes={processes}: give at least 1")
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        if _is_complete(out, settings):
            return
        aside = out.with_name(f".{out.name}.building")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        train_bpe(demo_texts(seed, TOKENIZER_RECORDS), aside / "tokenizer", vocab_size)
        units = _plan_units(settings)
        shards = _write_units(aside, units, seed, processes, progress)
        records = {f"{unit.split}/{unit.kind}": unit.last for unit in units}  # the last unit of a kind counts them all
        listed = [asdict(shard) for shard in shards]
        write_manifest(aside / MANIFEST_NAME, {"settings": asdict(settings), "records": records, "shards": listed})
        if out.exists():
            _remove(out)
        aside.rename(out)


def _is_complete(out: Path, settings: DemoSettings) -> bool:
    """Whether `out` holds demo data of these settings; False where it may be made or replaced.

    Raises:
        UserError: `out` is not empty and was not made here.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))["settings"]
        generator = found["generator"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} holds something other than demo data: name another folder or move it away") from error
    return bool(generator) and found == asdict(settings)


def _remove(out: Path) -> None:
    """Remove demo data of other settings; under another name first, so that no half of it is ever seen."""
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
    folder = Path(__file__).parent
    modules = [*sorted(folder.glob("demo*.py")), folder / "bpe.py", folder.parent / "shards" / "writer.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()[:16]


def _plan_units(settings: DemoSettings) -> list[Unit]:
    """All shards to be made; clips, the slowest, first, so that the processes end together."""
    records = {kind: int(settings.num_pictures * share) for kind, share in RECORDS_PER_PICTURE.items()}
    used = sum(count * PICTURES_PER_RECORD.get(kind, 1) for kind, count in records.items())
    train = {
        "clips": settings.num_clips,
        "scenes": settings.num_pictures - used,
        **records,
        "text": settings.num_texts,
    }
    heldout = dict.fromkeys(HELDOUT_TASKS, settings.num_heldout)
    return [
        Unit(split, kind, first // RECORDS_PER_SHARD, first, min(first + RECORDS_PER_SHARD, count))
        for split, counts in (("train", train), ("heldout", heldout))
        for kind, count in counts.items()
        for first in range(0, count, RECORDS_PER_SHARD)
    ]


def _write_units(
    folder: Path, units: list[Unit], seed: int, processes: int, progress: Callable[[int], None] | None
) -> list[ShardFacts]:
    """Make all shards; facts in the order of `units`."""
    done = 0
    facts: dict[Unit, ShardFacts] = {}
    for unit, fact in _run(folder, units, seed, processes):
        facts[unit] = fact
        if unit.split == "train" and unit.kind != "text":
            done += (unit.last - unit.first) * PICTURES_PER_RECORD.get(unit.kind, 1)
        if progress is not None:
            progress(done)
    return [facts[unit] for unit in units]


def _run(folder: Path, units: list[Unit], seed: int, processes: int) -> Iterator[tuple[Unit, ShardFacts]]:
    """Each unit as it is finished. A worker that dies raises here; nothing waits for it."""
    if processes == 1:
        yield from ((unit, _write_unit(unit, folder, seed)) for unit in units)
        return
    with closing(map_in_processes(partial(_write_unit, folder=folder, seed=seed), units, processes)) as made:
        yield from made


def _write_unit(unit: Unit, folder: Path, seed: int) -> ShardFacts:
    """Make one shard, SPLIT/KIND-00000.tar."""
    stencils = Stencils()
    writer = ShardWriter(folder / unit.split, unit.kind, first_shard=unit.number, manifest=None)
    with writer:
        for index in range(unit.first, unit.last):
            document = make_document(seed, unit.split, unit.kind, index, stencils)
            writer.write(document.key, document.record, document.media)
    (shard,) = writer.shards
    return ShardFacts(f"{unit.split}/{shard.path}", shard.records, shard.bytes)
