"""Items → shards: groups of items, each of which becomes one shard, here or in worker processes.

Enters: a stream of items. Leaves: one `ShardResult` a group, in order; the shard itself lies in the output folder, and
what it was made from in `.import/NUMBER.json`, so that a later run of an interrupted import makes none again. A group
depends on its items alone, so that any number of processes gives the same bytes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

from data_pipelines.decode.video import ClipDecoder
from data_pipelines.errors import DataError
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.writer import ShardWriter, write_manifest
from data_pipelines.sources.cleaning import RuleCount, Rules, new_counts
from data_pipelines.sources.finish import Treatment, attempt
from data_pipelines.sources.item import Item, problem
from data_pipelines.sources.pictures import media_bytes

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
class _Group:
    number: int
    items: tuple[Item, ...]


def shard_results(
    items: Iterable[Item],
    settings: ImportSettings,
    done: Mapping[int, dict[str, Any]],
    advance: Callable[[int], None],
) -> Iterator[ShardResult]:
    """Make the shards of `items`; `advance` is called with the number of items done since the last call.

    `done` are the groups that an interrupted run finished, by number: what its file in `.import` holds.
    """
    groups = _groups(items, settings)
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
