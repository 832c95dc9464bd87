"""Reading packs for a page: the documents of each as JSON, their details and pictures in files beside it.

Enters: planned packs; a sample to be looked at alone is a pack of one. Leaves: per pack its documents' summaries and
what was left out, and files `data/NNNNN.js` (details, loaded by the page when one is opened) and `media/*.webp`. Packs
are read by the loader's own `PackReader`, over several processes. Costs decoding, and 10 to 20 ms a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.config import DataConfig
from data_pipelines.index.source import SourceIndex
from data_pipelines.pack.read import PackReader
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.plan.planner import Pack
from data_pipelines.plan.shelf import Item
from data_pipelines.processes import map_in_processes
from data_pipelines.report.documents import DocumentWriter, Origin
from data_pipelines.report.survey import Survey
from data_pipelines.samples import PackedBatch
from data_pipelines.shards.names import file_of, public_name
from data_pipelines.tokenizer import TextTokenizer

CHUNK_DOCUMENTS = 24
CARD_BOXES = 24


@dataclass(frozen=True)
class ReadPack:
    """One pack as read: summaries of its documents (in order), and what was left out of it or changed, as events."""

    pack: Pack
    documents: list[dict[str, Any]]
    events: list[dict[str, Any]]


def choose_samples(survey: Survey, sources: Sequence[SourceIndex], config: DataConfig, count: int) -> list[Pack]:
    """`count` samples spread over all tasks of all data sets (rare ones whole), evenly over each: packs of one."""
    shares = _shares([len(group.tokens) for group in survey.groups], count)
    numbers = {source.name: number for number, source in enumerate(sources)}
    packs: list[Pack] = []
    for group, share in zip(survey.groups, shares, strict=True):
        number = numbers[group.dataset]
        for shard, row in group.places[np.linspace(0, len(group.places) - 1, share).round().astype(int)].tolist():
            table = sources[number].table(shard)
            lengths, _ = sample_lengths(group.dataset, table, np.array([row]), config.media, config.plan)
            counts = (int(column[0]) for column in (lengths.tokens, lengths.patches, lengths.patch_pairs))
            item = Item(number, shard, row, 0, *counts)
            packs.append(Pack(len(packs), (item,), item.tokens, item.patches))
    return packs


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` each group gives: equal parts, what small groups lack goes to the others.

    >>> _shares([100, 2, 50], 12)
    [5, 2, 5]
    """
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    while left:
        open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
        for i in open_groups[:left] if left < len(open_groups) else open_groups:
            more = min(max(1, left // len(open_groups)), sizes[i] - shares[i])
            shares[i] += more
        left = min(count, sum(sizes)) - sum(shares)
    return shares


def read_packs(
    packs: Sequence[Pack],
    sources: Sequence[SourceIndex],
    config: DataConfig,
    tokenizer: TextTokenizer,
    folder: Path,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ReadPack]:
    """Read `packs` and write their details and pictures into `folder`; `progress(done, total)` counts samples."""
    chunks = _chunks(packs)
    total, done = sum(len(pack.items) for pack in packs), 0
    (folder / "data").mkdir(parents=True, exist_ok=True)
    reading = _Reading(tuple(sources), config, tokenizer, folder)
    results: dict[int, list[ReadPack]] = {}
    if processes > 1 and len(chunks) > 1:
        with closing(map_in_processes(reading.chunk, list(enumerate(chunks)), processes)) as read:
            for (number, chunk), result in read:
                results[number] = result
                done += sum(len(pack.items) for pack in chunk)
                progress(done, total)
    else:
        for number, chunk in enumerate(chunks):
            results[number] = reading.chunk((number, chunk))
            done += sum(len(pack.items) for pack in chunk)
            progress(done, total)
    return [read for number in range(len(chunks)) for read in results[number]]


def _chunks(packs: Sequence[Pack]) -> list[list[Pack]]:
    """Packs in groups of about `CHUNK_DOCUMENTS` documents: one file of details each."""
    chunks: list[list[Pack]] = []
    size = CHUNK_DOCUMENTS
    for pack in packs:
        if size >= CHUNK_DOCUMENTS:
            chunks.append([])
            size = 0
        chunks[-1].append(pack)
        size += len(pack.items)
    return chunks


@dataclass(frozen=True)
class _Reading:
    """What a process needs to read packs; it travels to them pickled."""

    sources: tuple[SourceIndex, ...]
    config: DataConfig
    tokenizer: TextTokenizer
    folder: Path

    def chunk(self, task: tuple[int, Sequence[Pack]]) -> list[ReadPack]:
        """Read the packs of `task` (number, packs), write `data/number.js`, and return the summaries."""
        number, packs = task
        torch.set_num_threads(1)
        reader = PackReader(self.sources, self.config, self.tokenizer)
        writer = DocumentWriter(self.tokenizer, self.folder, f"{number:05d}-")
        details: list[dict[str, Any]] = []
        read = []
        for pack in packs:
            batch = reader[pack]
            origins = list(self._origins(pack, batch))
            documents = []
            for (item, _), document in zip(
                origins, writer.documents(batch, [origin for _, origin in origins]), strict=True
            ):
                documents.append({**_summary(document), "item": item, "chunk": number, "place": len(details)})
                details.append(document)
            read.append(ReadPack(pack, documents, [asdict(event) for event in (*pack.events, *batch.events)]))
        reader.close()
        # A script, not JSON: a page opened from disk may load scripts beside it, but fetch nothing.
        text = f"chunk({number}, {json.dumps(details, separators=(',', ':'))});\n"
        (self.folder / "data" / f"{number:05d}.js").write_text(text, encoding="utf-8")
        return read

    def _origins(self, pack: Pack, batch: PackedBatch) -> Iterator[tuple[int, Origin]]:
        """The samples that became documents, numbered as in the pack: its items without the ones that failed."""
        items = iter(enumerate(pack.items))
        for key, dataset in zip(batch.keys, batch.datasets, strict=True):
            number, item = next(
                (n, i) for n, i in items if (i.source, self.sources[i.source].key(i.shard, i.row)) == (dataset, key)
            )
            source = self.sources[item.source]
            record, read = source.read(item.shard, item.row)
            yield number, Origin(source.name, Path(file_of(public_name(source.shards[item.shard]))).name, record, read)


def _summary(document: dict[str, Any]) -> dict[str, Any]:
    """What a card and the lists need of a document; the rest is loaded when it is opened."""
    kept = {name: document[name] for name in ("dataset", "task", "key", "shard", "tokens", "supervised", "excerpt")}
    media = [{name: item[name] for name in ("kind", "file", "seen")} for item in document["media"]]
    for short, item in zip(media, document["media"], strict=True):
        if item["kind"] == "video":
            short |= {"strip": item["strip"], "seconds": item["seconds"], "count": 2 * item["grid"][0]}
    if media:
        media[0]["boxes"] = [box["points"] for box in document["media"][0]["boxes"][:CARD_BOXES]]
    return {**kept, "media": media[:4], "num_media": len(media)}
