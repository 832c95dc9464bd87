"""Items → shards, a manifest and a ledger: what every `qwen2vl-data import` does after its source has been read.

Enters: a stream of items and problems. Leaves in the output folder: `NAME-00000.tar` ..., `manifest.json` (source,
settings, counts, and records, bytes and SHA-256 of each shard) and `ledger.jsonl` (one line for everything that was
left out). Items are cut into shards by number and size before any medium is opened, so a shard depends on its items
alone: the same input gives the same bytes for any number of processes. An import that was interrupted continues: shards
that were finished, from the same items, are not made again. Costs the reading of the media once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_pipelines.errors import UserError
from data_pipelines.samples import LedgerEvent
from data_pipelines.shards.writer import MANIFEST_NAME, write_manifest
from data_pipelines.sources.cleaning import DUPLICATE_RULES, RuleCount, Rules, new_counts
from data_pipelines.sources.duplicates import drop_duplicates
from data_pipelines.sources.item import Entry, Expected, Item
from data_pipelines.sources.shard_groups import PROGRESS_FOLDER, ImportSettings, ShardResult, shard_results
from data_pipelines.whole import write_whole

LEDGER_NAME = "ledger.jsonl"


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
        UserError: the folder holds other shards, or a finished import and `overwrite` is off, or the source gives no
            item to replace it with.
    """
    _check_folder(settings)
    events: list[LedgerEvent] = []
    results = []
    counts = new_counts(settings.rules)
    items = _only_items(_without_duplicates(entries, settings.rules, counts), events, advance, expect)
    first = list(islice(items, 1))
    if not first and (settings.out / MANIFEST_NAME).exists():
        told = f" ({events[0].key}: {events[0].message})" if events else ""
        raise UserError(f"the source gave nothing to import{told}: the import in {settings.out} stays as it is")
    done = _prepare(settings)
    for result in shard_results(chain(first, items), settings, done, advance):
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
