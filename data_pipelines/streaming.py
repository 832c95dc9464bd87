"""The data way without an index (`reader: webdataset`): tars and URLs read once, packs as samples come.

Enters: as `loader`. Leaves: per global step this rank's `PackedBatch`es. Every rank reads shards of its own, so packs
depend on the world size. State: which shards are done, over all ranks, and it can be resumed under any number of them;
shards that were under way are read from their beginning again.

    shards → samples → lengths → packs (a process of its own) → decode, encode → collate (workers)
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, cast

from data_pipelines.config import DataConfig
from data_pipelines.loader import (
    SOURCE,
    STATE_VERSION,
    check_identity,
    check_step,
    identity_of,
    open_pool,
    source_facts,
    stall_limit_s,
)
from data_pipelines.pack.feed import Watch
from data_pipelines.pack.prefetch import InProcess, batches_of
from data_pipelines.pack.read import PackReader
from data_pipelines.pack.slots import slot_bytes
from data_pipelines.pack.stream_process import StreamProcess
from data_pipelines.pack.workers import WorkerPool
from data_pipelines.plan.balance import PackCost, order_by_cost
from data_pipelines.plan.mixture import shares_at
from data_pipelines.plan.planner import Pack
from data_pipelines.plan.progress import Ended, Progress, Tally
from data_pipelines.plan.stream import CountedSample, SourceStream, StreamedPack, StreamPlanner
from data_pipelines.samples import PackedBatch, Record
from data_pipelines.shards.names import public_name
from data_pipelines.shards.storage import expand_shards
from data_pipelines.tokenizer import TextTokenizer

# Room in a worker's slot for the stored bytes of a pack, touched only as far as they need it.
ROOM_BYTES = 512 << 20


class StreamLoader:
    """This rank's packs, step after step, without end; used like `PackLoader`.

    `gather` gives what every rank passes to it, on every rank: `state_dict` is collective where there are several.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: TextTokenizer,
        packs_per_step: int,
        rank: int,
        world: int,
        seed: int,
        pin_memory: bool = False,
        cost: PackCost | None = None,
        gather: Callable[[Any], list[Any]] = lambda item: [item],
    ) -> None:
        check_step(config, packs_per_step, rank, world)
        self.dataset_names = tuple(config.sources)
        self._config, self._tokenizer, self._pin_memory = config, tokenizer, pin_memory
        self._packs_per_step, self._rank, self._world, self._seed = packs_per_step, rank, world, seed
        self._cost, self._gather = cost, gather
        self._shards = {
            name: expand_shards(name, source.shards, config.remote) for name, source in config.sources.items()
        }
        # Where all ranks began, what was handed out here since, and what was read, which is ahead of that.
        self._base = {name: Progress() for name in self._shards}
        self._packs = self._tokens = self._steps = 0
        self._given, self._read = Tally(), Tally()
        planner = self._make_planner()  # refuses what cannot be streamed here, not in the first step
        self._phases = planner.phases
        planner.close()
        self._feed: StreamProcess | None = None
        self._planner: StreamPlanner | None = None  # without workers
        self._pool: WorkerPool | InProcess | None = None

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Steps from the current state on; each is this rank's packs in slot order."""
        self.close()
        self._read = self._given.copy()
        ahead: deque[tuple[list[Ended], int]] = deque()
        batches = self._batches(ahead)
        while True:
            step = list(islice(batches, self._packs_per_step // self._world))
            if not step:
                return  # closed meanwhile
            # What counts as done is what was handed out.
            self._given.add(*ahead.popleft())
            self._steps += 1
            yield step

    def shares(self, tokens: int) -> dict[str, float]:
        """The share of samples that each source is to give after `tokens` of training."""
        return dict(zip(self.dataset_names, shares_at(self._phases, tokens), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out: JSON-able, the same on every rank. Collective."""
        ranks = self._gather((self._given.done, self._given.tokens, self._steps))
        sources = {
            name: base.plus([done.get(name, {}) for done, _, _ in ranks], len(self._shards[name]))
            for name, base in self._base.items()
        }
        for name, progress in sources.items():  # epochs that all ranks have done need no bits any more
            self._base[name] = self._base[name].since(progress.epoch)
            self._given.forget(name, progress.epoch)
            self._read.forget(name, progress.epoch)
        # Ranks that share the packs of another one read none themselves.
        packs = self._packs + max(steps for _, _, steps in ranks) * self._packs_per_step
        tokens = self._tokens + sum(packed for _, packed, _ in ranks)
        stream = {
            "packs": packs,
            "tokens": tokens,
            "sources": {name: progress.to_json() for name, progress in sources.items()},
        }
        return {"version": STATE_VERSION, "identity": self._identity(), "stream": stream}

    def load_state_dict(self, state: dict[str, Any], accept_changes: bool = False) -> list[str]:
        """Continue after the step at which `state` was taken; call it before iterating. As `PackLoader`'s.

        Raises:
            UserError: the state belongs to other data, budgets or seed; the message names what differs.
        """
        mine, theirs = self._identity(), state["identity"]
        notes = []
        changed = check_identity(state, mine, accept_changes)
        before, now = source_facts(theirs), source_facts(mine)
        stream = state["stream"]
        for name in self._base:
            held = Progress.from_json(stream["sources"][name]) if name in before else None
            if held is not None and before[name][:2] == now[name][:2]:
                self._base[name] = held
            else:
                self._base[name] = Progress(held.epoch + 1 if held is not None else 0)
                notes.append(f"source {name} is new or its shards changed: it begins epoch {self._base[name].epoch}")
        notes += [f"source {name} is gone" for name in before if name not in now]
        if any(key.startswith(SOURCE) for key in changed):
            notes.append("the mixture counts its shares anew from here")
        self._packs, self._tokens = stream["packs"], stream["tokens"]
        self._given, self._steps = Tally(), 0
        return notes

    def under_way(self) -> list[str]:
        """What each busy worker, or the stream that is waited for, is at, as `PackLoader`'s."""
        pool, feed = self._pool, self._feed
        return [*(pool.under_way() if pool is not None else ()), *(feed.feed.under_way() if feed is not None else ())]

    def close(self) -> None:
        """End the processes, and close what is open. Iterating again starts them anew from the current state."""
        parts = (self._pool, self._feed, self._planner)
        self._pool = self._feed = self._planner = None
        for part in parts:
            if part is not None:
                part.close()

    def _make_planner(self, watch: Watch = lambda what: None) -> StreamPlanner:
        """This rank's packs behind those that were read."""
        streams = [
            SourceStream(
                name,
                shards,
                self._base[name],
                self._read.done.get(name, {}),
                self._config,
                self._seed,
                self._rank,
                self._world,
                watch,
            )
            for name, shards in self._shards.items()
        ]
        tokens = self._tokens + self._read.tokens * self._world
        return StreamPlanner(streams, self._config, self._tokenizer, self._world, tokens, self._cost)

    def _batches(self, ahead: deque[tuple[list[Ended], int]]) -> Iterator[PackedBatch]:
        """This rank's packs as batches, made here or by workers; what each step has done as below."""
        config, stall_s = self._config, stall_limit_s(self._config, chain.from_iterable(self._shards.values()))
        if config.loader.num_workers:
            self._feed = StreamProcess(self._make_planner, stall_s)
        else:
            self._planner = self._make_planner()
        self._pool = open_pool(
            config,
            lambda watch: _CarriedReader(self.dataset_names, config, self._tokenizer, watch),
            lambda pack, number: (self.dataset_names[pack.items[number].source], pack.samples[number].raw.key),
            self._pin_memory,
            stall_s,
            room=ROOM_BYTES,
        )
        return batches_of(self._numbered_packs(ahead), self._pool, self._feed.feed if self._feed is not None else None)

    def _numbered_packs(self, ahead: deque[tuple[list[Ended], int]]) -> Iterator[StreamedPack | None]:
        """This rank's packs by their numbers in the run, None where one is not made yet; what each step has done is
        appended to `ahead`.
        """
        room = slot_bytes(self._config.plan.max_tokens, self._config.plan.max_patches) + ROOM_BYTES - (1 << 20)
        for step in range(self._steps, 1 << 62):
            packs: list[StreamedPack] = []
            while len(packs) < self._packs_per_step // self._world:
                pack = self._next_pack()
                if pack is None:
                    yield None
                    continue
                packs.append(pack)
                self._read.add(pack.ended, pack.num_tokens)  # at once: a process that dies is replaced from here
            ahead.append(([ended for pack in packs for ended in pack.ended], sum(pack.num_tokens for pack in packs)))
            if self._cost is not None:
                packs = order_by_cost(packs, self._cost)
            first = self._packs + step * self._packs_per_step + self._rank
            for slot, pack in enumerate(packs):
                yield _within(_numbered(pack, first + slot * self._world), room)

    def _next_pack(self) -> StreamedPack | None:
        if self._planner is not None:
            return self._planner.next_pack()
        assert self._feed is not None
        return self._feed.take()

    def _identity(self) -> dict[str, Any]:
        facts = {}
        for name, shards in self._shards.items():
            names = "\n".join(os.path.basename(public_name(shard)) for shard in shards)
            facts[name] = (len(shards), hashlib.blake2b(names.encode(), digest_size=8).hexdigest())
        return identity_of(self._config, self._tokenizer, self._seed, self._cost, facts)


class _Carried:
    """The samples of one source that a pack brought along, as a source to read them from."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: dict[tuple[int, int], CountedSample] = {}

    def prefetch(self, samples: Sequence[tuple[int, int]], progress: Callable[[], None]) -> None:
        """They are here."""

    def key(self, shard: int, row: int) -> str:
        return self.samples[shard, row].raw.key

    def read(self, shard: int, row: int) -> tuple[Record, Callable[[str], bytes]]:
        return self.samples[shard, row].read()

    def mismatch(self, shard: int) -> tuple[str, str]:
        return "plan_mismatch", "defect of this program"

    def close(self) -> None:
        self.samples.clear()


class _CarriedReader(PackReader):
    """Reads packs that bring their samples along."""

    def __init__(
        self, names: Sequence[str], config: DataConfig, tokenizer: TextTokenizer, watch: Callable[[int], None]
    ) -> None:
        self._carried = [_Carried(name) for name in names]
        super().__init__(self._carried, config, tokenizer, watch)

    def __getitem__(self, pack: Pack) -> PackedBatch:
        """The batch of a `StreamedPack`."""
        for source in self._carried:
            source.close()
        for item, sample in zip(pack.items, cast(StreamedPack, pack).samples, strict=True):
            self._carried[item.source].samples[item.shard, item.row] = sample
        return super().__getitem__(pack)


def _numbered(pack: StreamedPack, number: int) -> StreamedPack:
    """The pack by its number in the run; events that concern no sample get the pack as their key."""
    events = tuple(event if event.key else replace(event, key=f"pack {number}") for event in pack.events)
    return replace(pack, number=number, events=events)


def _within(pack: StreamedPack, room: int) -> StreamedPack:
    """The pack, without its largest samples where the stored bytes would not fit a worker's slot."""
    samples, skipped = list(pack.samples), list(pack.skipped)
    sizes = [sample.num_bytes for sample in samples]
    while sum(sizes) > room:
        largest = sizes.index(max(sizes))
        message = f"{sizes[largest]} stored bytes; a streamed pack has room for {room}: store the media smaller"
        skipped.append((largest, "too_many_bytes", message))
        samples[largest] = replace(samples[largest], raw=replace(samples[largest].raw, members={}))
        sizes[largest] = 0
    return replace(pack, samples=tuple(samples), skipped=tuple(skipped))
