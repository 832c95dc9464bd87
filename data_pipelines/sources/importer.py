"""Items → shards, a manifest and a ledger: what every `qwen2vl-data import` does after its source has been read.

Enters: a stream of items and problems. Leaves in the output folder: `NAME-00000.tar` ..., `manifest.json` (source,
settings, counts, and records, bytes and SHA-256 of each shard) and `ledger.jsonl` (one line for everything that was
left out). Items are cut into shards by number and size before any medium is opened, so a shard depends on its items
alone: the same input gives the same bytes for any number of processes. An import that was interrupted continues: shards
that were finished, from the same items, are not made again. Costs the reading of the media once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from queue import Queue
from typing import Any

from data_pipelines.decode.video import ClipDecoder
from data_pipelines.errors import DataError, UserError
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.writer import MANIFEST_NAME, ShardWriter, write_manifest
from data_pipelines.sources.cleaning import DUPLICATE_RULES, RuleCount, Rules, new_counts
from data_pipelines.sources.duplicates import drop_duplicates
from data_pipelines.sources.finish import Treatment, attempt
from data_pipelines.sources.item import Entry, Expected, Item, problem
from data_pipelines.sources.pictures import media_bytes
from data_pipelines.whole import write_whole

LEDGER_NAME = "ledger.jsonl"
PROGRESS_FOLDER = ".import"
STEP_SECONDS = 0.2  # how often workers tell how far they are


@dataclass(frozen=True, slots=True)
class ImportSettings:
    """Where shards go and how they are cut. `source` and `options` are only written to the manifest."""

    out: Path
    name: str
    source: str
    options: Mapping[str, Any]
    max_records: int = 1000
    max_bytes: int = 512 << 20
    processes: int = 1
    overwrite: bool = False
    verify: bool = False
    rules: Rules = ()


@dataclass(slots=True)
class ShardResult:
    """One group of items after its work: `file` None where no item of it could be used."""

    file: str | None
    items: int
    records: int = 0
    bytes: int = 0
    sha256: str = ""
    media: int = 0
    tasks: dict[str, int] = field(default_factory=dict)
    events: list[LedgerEvent] = field(default_factory=list)
    cleaning: list[RuleCount] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ImportReport:
    """Totals of an import. `items` counts the entries of the source, those that could not be read included."""

    items: int
    records: int
    media: int
    shards: int
    bytes: int
    tasks: dict[str, int]
    reasons: dict[str, int]
    cleaning: list[RuleCount]


@dataclass(frozen=True, slots=True)
class _Group:
    number: int
    items: tuple[Item, ...]


def run_import(
    entries: Iterable[Entry],
    settings: ImportSettings,
    advance: Callable[[int], None],
    expect: Callable[[int], None] | None = None,
) -> ImportReport:
    """Write the shards of all `entries`.

    `advance` is called with the number of entries done since the last call, `expect` with the number that there will
    be in all, as often as the source tells it better.

    With `overwrite`, the old import stays until the source has given its first item: a source that cannot be opened
    costs nothing.

    Raises:
        UserError: the folder holds other shards, or a finished import and `overwrite` is off.
    """
    _check_folder(settings)
    events: list[LedgerEvent] = []
    results = []
    counts = new_counts(settings.rules)
    items = _only_items(_without_duplicates(entries, settings.rules, counts), events, advance, expect)
    first = list(islice(items, 1))
    done = _prepare(settings)
    for result in _results(_groups(chain(first, items), settings), settings, done, advance):
        results.append(result)
    _remove_stale(settings, done, results)
    events += [event for result in results for event in result.events]
    events = [replace(event, dataset=settings.name) for event in events]
    for result in results:
        for count, more in zip(counts, result.cleaning, strict=True):
            count.add(more)
    report = _report(results, events, counts)
    _write_ledger(settings.out / LEDGER_NAME, events)
    write_manifest(settings.out / MANIFEST_NAME, _manifest(settings, results, report))
    _remove_folder(settings.out / PROGRESS_FOLDER)
    return report


def _check_folder(settings: ImportSettings) -> None:
    """Refuse a folder whose shards are not this import's to replace or to continue; nothing is changed."""
    out = settings.out
    if (out / MANIFEST_NAME).exists():
        if not settings.overwrite:
            raise UserError(f"{out} holds a finished import: choose another --out, or replace it with --overwrite")
        return
    others = sorted(path.name for path in out.glob("*.tar"))
    if others and not (out / PROGRESS_FOLDER).exists():
        raise UserError(f"{out} holds other shards ({others[0]}, ...): choose another --out")


def _prepare(settings: ImportSettings) -> dict[int, dict[str, Any]]:
    """Make the folder ready; returns the finished groups of an interrupted run by number."""
    out = settings.out
    if (out / MANIFEST_NAME).exists():
        _remove_old(out)
    (out / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
    paths = sorted((out / PROGRESS_FOLDER).glob("*.json"))
    return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _remove_old(out: Path) -> None:
    """Remove exactly the shards that the folder's manifest lists, and the manifest."""
    manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    for shard in manifest.get("shards", ()):
        name = shard.get("path")
        if isinstance(name, str) and "/" not in name and name.endswith(".tar"):
            (out / name).unlink(missing_ok=True)
    (out / MANIFEST_NAME).unlink()


def _only_items(
    entries: Iterable[Entry],
    events: list[LedgerEvent],
    advance: Callable[[int], None],
    expect: Callable[[int], None] | None,
) -> Iterator[Item]:
    """The items; problems go to `events` and are done with, and what the source expects is told on."""
    drawn, share = 0, 0.0
    for entry in entries:
        if isinstance(entry, Expected):
            share += entry.share
            if expect is not None and share > 0:
                expect(round((drawn + entry.count) / share))
            continue
        drawn += 1
        if isinstance(entry, Item):
            yield entry
        else:
            events.append(entry)
            advance(1)


def _without_duplicates(entries: Iterable[Entry], rules: Rules, counts: list[RuleCount]) -> Iterable[Entry]:
    """The entries after the rules that compare items with each other."""
    for (name, rule), count in zip(rules, counts, strict=True):
        if name in DUPLICATE_RULES:
            entries = drop_duplicates(entries, rule, count)
    return entries


def _groups(items: Iterable[Item], settings: ImportSettings) -> Iterator[_Group]:
    """Cut the items into shards of at most `max_records` items and about `max_bytes` bytes of media."""
    number, held, size = 0, list[Item](), 0
    for item in items:
        weight = sum(media_bytes(source) for source in item.media)
        if held and (len(held) >= settings.max_records or size + weight > settings.max_bytes):
            yield _Group(number, tuple(held))
            number, held, size = number + 1, [], 0
        held.append(item)
        size += weight
    if held:
        yield _Group(number, tuple(held))


def _results(
    groups: Iterator[_Group],
    settings: ImportSettings,
    done: Mapping[int, dict[str, Any]],
    advance: Callable[[int], None],
) -> Iterator[ShardResult]:
    """The groups' results in order, made here or in worker processes."""
    if settings.processes <= 1:
        for group in groups:
            yield _import_group(group, settings, done.get(group.number), advance)
        return
    # Not "fork": the progress display runs a thread, and a forked copy of its lock could stay locked for ever. The fork
    # server imports this module once for all workers; importing it anew in each takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Manager() as manager, ProcessPoolExecutor(settings.processes, mp_context=context) as pool:
        steps = manager.Queue()
        waiting: deque[Future[ShardResult]] = deque()
        for group in groups:
            waiting.append(pool.submit(_import_group_aside, group, settings, done.get(group.number), steps))
            if len(waiting) >= 2 * settings.processes:
                yield _awaited(waiting.popleft(), steps, advance)
        while waiting:
            yield _awaited(waiting.popleft(), steps, advance)


def _awaited(future: Future[ShardResult], steps: Queue[int], advance: Callable[[int], None]) -> ShardResult:
    """The result of a worker; until it is there, the steps of all workers are passed on."""
    ready = False
    while not ready:
        ready = bool(wait([future], timeout=STEP_SECONDS).done)
        count = 0
        while not steps.empty():
            count += steps.get()
        if count:
            advance(count)
    return future.result()


def _import_group_aside(
    group: _Group, settings: ImportSettings, before: dict[str, Any] | None, steps: Queue[int]
) -> ShardResult:
    """`_import_group` in a worker, which tells of its items a few times a second (a message costs 0.1 ms)."""
    held, told = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal held, told
        held += count
        if time.monotonic() - told >= STEP_SECONDS:
            steps.put(held)
            held, told = 0, time.monotonic()

    result = _import_group(group, settings, before, advance)
    steps.put(held)
    return result


def _import_group(
    group: _Group, settings: ImportSettings, before: dict[str, Any] | None, advance: Callable[[int], None]
) -> ShardResult:
    digest = _digest(group, settings)
    if before is not None and before["digest"] == digest:
        kept = before["result"]
        if kept["file"] is None or (settings.out / kept["file"]).is_file():
            advance(len(group.items))
            events = [LedgerEvent(**event) for event in kept["events"]]
            return ShardResult(**{**kept, "events": events, "cleaning": [RuleCount(**c) for c in kept["cleaning"]]})
    result = _write_group(group, settings, advance)
    aside = settings.out / PROGRESS_FOLDER / f"{group.number}.json"
    write_manifest(aside, {"digest": digest, "result": asdict(result)})
    return result


def _write_group(group: _Group, settings: ImportSettings, advance: Callable[[int], None]) -> ShardResult:
    result = ShardResult(None, len(group.items), cleaning=new_counts(settings.rules))
    tasks: Counter[str] = Counter()
    # One shard a group: the limits that cut groups are not to cut again here.
    writer = ShardWriter(
        settings.out,
        settings.name,
        max_records=len(group.items) + 1,
        max_bytes=1 << 50,
        first_shard=group.number,
        manifest=None,
    )
    with writer, closing(ClipDecoder()) as clips:
        treatment = Treatment(clips, settings.verify, settings.rules, result.cleaning)
        for item in group.items:
            finished, events = attempt(item, treatment)
            advance(1)
            result.events += events
            if finished is not None:
                try:
                    writer.write(finished.key, finished.record, finished.media)
                except DataError as error:  # a key that came twice, or one that a tar cannot hold
                    result.events.append(problem(finished.key, error.reason, error.message))
                    continue
                result.records += 1
                result.media += len(finished.media)
                tasks[finished.record["task"]] += 1
    result.tasks = dict(sorted(tasks.items()))
    for shard in writer.shards:
        result.file, result.bytes = shard.path, shard.bytes
        with open(settings.out / shard.path, "rb") as file:
            result.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return result


def _digest(group: _Group, settings: ImportSettings) -> str:
    """What a shard is made from: its items, the state of their files, and what is done to them."""
    digest = hashlib.sha256(repr((settings.name, settings.verify, settings.rules)).encode())
    for item in group.items:
        digest.update(repr(replace(item, media=())).encode("utf-8", "surrogatepass"))
        for source in item.media:
            state: object = None
            if source.data is not None:
                state = hashlib.sha256(source.data).hexdigest()
            elif source.path is not None and source.path.exists():
                facts = source.path.stat()
                state = (facts.st_size, facts.st_mtime_ns)
            digest.update(repr((replace(source, data=None), state)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _remove_stale(settings: ImportSettings, done: Mapping[int, dict[str, Any]], results: list[ShardResult]) -> None:
    """Shards that an interrupted import of other data left behind do not belong to this one."""
    ours = {result.file for result in results}
    for entry in done.values():
        name = entry["result"]["file"]
        if name is not None and name not in ours:
            (settings.out / name).unlink(missing_ok=True)


def _report(results: list[ShardResult], events: list[LedgerEvent], counts: list[RuleCount]) -> ImportReport:
    tasks: Counter[str] = Counter()
    for result in results:
        tasks.update(result.tasks)
    unread = len(events) - sum(len(result.events) for result in results)
    return ImportReport(
        items=sum(result.items for result in results) + unread,
        records=sum(result.records for result in results),
        media=sum(result.media for result in results),
        shards=sum(result.file is not None for result in results),
        bytes=sum(result.bytes for result in results),
        tasks=dict(sorted(tasks.items())),
        reasons=dict(sorted(Counter(event.reason for event in events).items())),
        cleaning=counts,
    )


def _manifest(settings: ImportSettings, results: list[ShardResult], report: ImportReport) -> dict[str, Any]:
    return {
        "name": settings.name,
        "source": settings.source,
        "settings": {
            **settings.options,
            "max_records": settings.max_records,
            "max_bytes": settings.max_bytes,
        },
        **asdict(report),
        "shards": [
            {"path": r.file, "records": r.records, "bytes": r.bytes, "sha256": r.sha256}
            for r in results
            if r.file is not None
        ],
    }


def _write_ledger(path: Path, events: list[LedgerEvent]) -> None:
    lines = "".join(json.dumps(asdict(event), ensure_ascii=True) + "\n" for event in events)
    write_whole(path, lines)


def _remove_folder(folder: Path) -> None:
    for path in folder.iterdir():  # the groups' files, and what a killed process was writing aside
        path.unlink()
    folder.rmdir()
