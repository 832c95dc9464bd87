"""One planned pack → one batch: read, decode and encode its samples, lay them end to end.

Enters: a `Pack` of the plan. Leaves: its `PackedBatch`; a sample that fails leaves the pack and becomes an event, so
the plan never moves. Stateless: the batch depends on the pack alone, so any worker, or a plain DataLoader, may make it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch.utils.data import Dataset

from data_pipelines.config import DataConfig
from data_pipelines.decode.clip_cache import open_clip_cache
from data_pipelines.encode.budget import within_patches
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import DataError, PlanMismatch
from data_pipelines.pack.collate import collate
from data_pipelines.pack.workers import IDLE, PREPARING
from data_pipelines.plan.planner import Pack
from data_pipelines.plan.shelf import Item
from data_pipelines.samples import Encoded, LedgerEvent, PackedBatch, Record
from data_pipelines.tokenizer import TextTokenizer


class SampleSource(Protocol):
    """Where a pack's samples are read from: a `SourceIndex`, or samples that a pack brings along."""

    name: str

    def prefetch(self, samples: Sequence[tuple[int, int]], progress: Callable[[], None]) -> None:
        """The (shard, row) samples that are read next; `progress` is called as their bytes come."""
        ...

    def key(self, shard: int, row: int) -> str:
        """The key of a sample."""
        ...

    def read(self, shard: int, row: int) -> tuple[Record, Callable[[str], bytes]]:
        """A sample's record, and a function that reads a media member by name."""
        ...

    def mismatch(self, shard: int) -> tuple[str, str]:
        """Reason and cause, for the ledger, where a sample's encoding is not as planned."""
        ...

    def close(self) -> None:
        """Give back what is open."""
        ...


class PackReader(Dataset[PackedBatch]):
    """Reads packs of one mixture. `watch(i)` is called before item i of a pack is begun.

    With `IDLE` after the last; with `PREPARING` before the first, as bytes of remote shards come, from several threads.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        config: DataConfig,
        tokenizer: TextTokenizer,
        watch: Callable[[int], None] = lambda item: None,
    ) -> None:
        self.sources = sources
        self.watch = watch
        self._special = tokenizer.special
        self._max_tokens = config.plan.max_tokens
        self._one_dimensional = config.positions == "1d"
        cache = open_clip_cache(config.loader)
        media = within_patches(config.media, config.plan.max_patches)
        self._encoder = SampleEncoder(
            tokenizer, config.template, media, config.plan.max_tokens, config.vision_ids, cache
        )

    def __getitem__(self, pack: Pack) -> PackedBatch:
        """The batch of `pack`; its `skipped` samples are left out and reported."""
        documents, events = [], list(pack.events)
        skipped = {number: (reason, message) for number, reason, message in pack.skipped}
        for source, wanted in enumerate(self.sources):
            samples = [(item.shard, item.row) for item in pack.items if item.source == source]
            wanted.prefetch(samples, lambda: self.watch(PREPARING))
        for number, item in enumerate(pack.items):
            name = self.sources[item.source].name
            if number in skipped:
                events.append(LedgerEvent(name, self.key(item), *skipped[number]))
                continue
            self.watch(number)
            try:
                document, notes = self._encode(item)
                documents.append(document)
                events += [LedgerEvent(name, note.key, note.reason, note.message) for note in notes]
            except DataError as error:
                events.append(LedgerEvent(name, error.key, error.reason, error.message))
            except PlanMismatch as error:
                reason, cause = self.sources[item.source].mismatch(item.shard)
                events.append(LedgerEvent(name, self.key(item), reason, f"{cause}: {error}"))
            except Exception as error:
                # Decoders raise what they like on broken bytes; one sample must not end a run. It is counted by type.
                message = f"{type(error).__name__}: {error}"
                events.append(LedgerEvent(name, self.key(item), "unexpected_error", message))
        self.watch(IDLE)
        return collate(pack.number, documents, self._special, self._max_tokens, events, self._one_dimensional)

    def key(self, item: Item) -> str:
        """The key of a planned sample."""
        return self.sources[item.source].key(item.shard, item.row)

    def close(self) -> None:
        """Close shards and end the clip decoder, if one was started."""
        self._encoder.close()
        for source in self.sources:
            source.close()

    def _encode(self, item: Item) -> tuple[Encoded, list[LedgerEvent]]:
        record, read_member = self.sources[item.source].read(item.shard, item.row)
        document, notes = self._encoder.encode(record, read_member, item.source)
        tokens, patches = int(document.input_ids.shape[0]), sum(plan.num_patches for plan in document.media)
        if (tokens, patches) != (item.tokens, item.patches):
            planned = f"planned {item.tokens} tokens and {item.patches} patches"
            raise PlanMismatch(f"{record.key}: {planned}, encoded {tokens} and {patches}")
        return document, notes
