"""Packs from shards that are read once, without an index: the same packer over samples as they come.

Enters: this rank's share of each source's shards, and the seed. Leaves: packs with their samples' bytes. Costs a pass
over the shards, and per sample its record, its media's headers and its text's tokens: about 1 ms. Memory: the samples
in the packer's pool, and the facts of a shard under way: a whole local tar that has none gets its index from them.

    shards of this rank → samples, several shards mixed → mixture → lengths → packer → packs

Every epoch permutes a source's shards; rank r of W reads the r-th, (r+W)-th, ... of those not yet done. A shard is done
when its last sample left in a pack. State: the shards done in each epoch's order; a resume, under any number of ranks,
reads the others from their beginning: no sample is lost, those of shards that were under way may come again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from data_pipelines.config import DataConfig
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.encode.budget import within_patches
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import DataError, ShardError, UserError
from data_pipelines.index.read import probe_media, read_member, read_record, with_media
from data_pipelines.index.streamed import StreamedFacts
from data_pipelines.plan.balance import PackCost
from data_pipelines.plan.mixture import Mixture, mixture_phases
from data_pipelines.plan.order import hash_key, permutation
from data_pipelines.plan.planner import Pack, new_packer, nothing_usable
from data_pipelines.plan.progress import Done, Ended, Progress
from data_pipelines.plan.shelf import Item
from data_pipelines.samples import LedgerEvent, Media, Record
from data_pipelines.shards.names import public_name
from data_pipelines.shards.sample_file import SampleFile
from data_pipelines.shards.stream import RawSample, stream_samples
from data_pipelines.tokenizer import TextTokenizer

# A shard that ends early costs what it has left; one that cannot be reached ends the run before all follow it.
_FATAL = frozenset({"unreadable_shard", "read_failed", "no_plugin"})


@dataclass(frozen=True, slots=True)
class CountedSample:
    """A sample as stored, with the facts of its media."""

    raw: RawSample
    facts: dict[str, Media]

    @property
    def num_bytes(self) -> int:
        """Of its members."""
        return sum(map(len, self.raw.members.values()))

    def read(self) -> tuple[Record, Any]:
        """Its record, and a function that reads a media member by name.

        Raises:
            RecordError, MediaError: with the sample's key.
        """
        file = SampleFile(self.raw)
        record = with_media(read_record(self.raw.key, file.members, file), self.facts)
        return record, lambda name: read_member(self.raw.key, name, file.members[name], file)


@dataclass(frozen=True, slots=True)
class StreamedPack(Pack):
    """A pack that brings its samples along, in the order of its items; `ended` are the shards done with it."""

    samples: tuple[CountedSample, ...] = ()
    ended: tuple[Ended, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Of its samples' members."""
        return sum(sample.num_bytes for sample in self.samples)


@dataclass(slots=True)
class _OpenShard:
    """A shard under way, at `place` of its epoch's order: `rows` samples read, `waiting` of them in the pool."""

    epoch: int
    place: int
    shard: int
    samples: Generator[RawSample, None, None]
    problems: list[ShardError]
    facts: StreamedFacts
    rows: int = 0
    waiting: int = 0
    ended: bool = False


class SourceStream:
    """One source's samples on one rank, endless. `done` are the shards done here, beyond those of `progress`.

    `events` and `ended` (epoch, place) tell what was lost and which shards were done since they were last cleared.
    `watch` is called with a shard's name before each sample of it, and whenever bytes of it came.

    Raises (from `next_sample`):
        ShardError: a shard that cannot be opened or reached, or two epochs without a usable sample.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[str],
        progress: Progress,
        done: Done,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        watch: Callable[[str], None] = lambda shard: None,
    ) -> None:
        if len(shards) < world:
            raise UserError(
                f"source {name!r} has {len(shards)} shards for {world} ranks: with reader=webdataset every rank reads "
                "shards of its own. Use fewer ranks, more shards, or reader=index"
            )
        self.name, self.shards = name, shards
        self.events: list[LedgerEvent] = []
        self.ended: list[tuple[int, int]] = []
        self._done = done
        self._config, self._seed, self._watch = config, seed, watch
        self._places = self._shards_of(progress, rank, world)
        self._next_place = next(self._places)
        self._open: deque[_OpenShard] = deque()
        self._under_way: dict[tuple[int, int], _OpenShard] = {}
        self._ended_since_usable = 0

    def next_sample(self) -> tuple[_OpenShard, RawSample]:
        """The next sample, of each open shard in turn."""
        while True:
            self._open_shards()
            opened = self._open[0]
            self._watch(public_name(self.shards[opened.shard]))
            raw = next(opened.samples, None)
            self._tell(opened)
            if raw is not None:
                self._open.rotate(-1)
                opened.rows += 1
                return opened, raw
            self._open.popleft()
            opened.ended = True
            opened.facts.keep()
            self._close_if_done(opened)
            self._ended_since_usable += 1
            if self._ended_since_usable > 2 * len(self.shards):
                raise nothing_usable(self.name, self.events)

    def enter(self, opened: _OpenShard) -> None:
        """A sample of `opened` went into the pool."""
        opened.waiting += 1
        self._ended_since_usable = 0

    def leave(self, epoch: int, shard: int) -> None:
        """A sample left the pool in a pack."""
        opened = self._under_way[epoch, shard]
        opened.waiting -= 1
        self._close_if_done(opened)

    def close(self) -> None:
        """Close the shards under way."""
        for opened in self._open:
            opened.samples.close()

    def tell(self, error: DataError) -> None:
        """Note what a sample or shard lost."""
        self.events.append(LedgerEvent(self.name, error.key, error.reason, error.message))

    def _shards_of(self, progress: Progress, rank: int, world: int) -> Iterator[tuple[int, int, int]]:
        """This rank's (epoch, place, shard) without end. The split follows what was done when the run began, on all
        ranks.
        """
        for epoch in count(progress.epoch):
            order = stream_order(len(self.shards), self._seed, self.name, epoch)
            done = f"{progress.done.get(epoch, 0):0{len(order)}b}"[::-1]
            left = [place for place in range(len(order)) if done[place] == "0"]
            for place in left[rank::world]:
                if not self._done.get(epoch, 0) >> place & 1:
                    yield epoch, place, order[place]

    def _open_shards(self) -> None:
        """Keep `window_shards` open, all of one epoch."""
        while len(self._open) < self._config.plan.window_shards:
            epoch, place, shard = self._next_place
            if self._open and epoch != self._open[0].epoch:
                return
            problems: list[ShardError] = []
            watch = partial(self._watch, public_name(self.shards[shard]))
            samples = stream_samples(self.shards[shard], self._config.remote, problems, watch)
            opened = _OpenShard(epoch, place, shard, samples, problems, StreamedFacts(self.shards[shard]))
            self._open.append(opened)
            self._under_way[epoch, shard] = opened
            self._next_place = next(self._places)

    def _tell(self, opened: _OpenShard) -> None:
        for problem in opened.problems:
            if problem.reason in _FATAL:
                raise problem
            self.tell(problem)
        opened.problems.clear()

    def _close_if_done(self, opened: _OpenShard) -> None:
        if opened.ended and not opened.waiting:
            self.ended.append((opened.epoch, opened.place))
            del self._under_way[opened.epoch, opened.shard]


def stream_order(num_shards: int, seed: int, source: str, epoch: int) -> list[int]:
    """The shards of a source as an epoch's ranks take them in turn: at each place a shard's number."""
    order: list[int] = permutation(num_shards, hash_key(seed, source, "stream", epoch)).tolist()
    return order


class StreamPlanner:
    """This rank's packs, numbered from 0; `tokens` are those of all ranks before this run began."""

    def __init__(
        self,
        streams: Sequence[SourceStream],
        config: DataConfig,
        tokenizer: TextTokenizer,
        world: int,
        tokens: int = 0,
        cost: PackCost | None = None,
    ) -> None:
        self._streams, self._config, self._world = streams, config, world
        self._tokens = float(tokens)
        self.phases = mixture_phases(list(config.sources.values()), _no_sizes, config.plan.size_temperature)
        self._phase = -1
        self._number = 0
        self._packer = new_packer(config.plan, None, cost)
        media = within_patches(config.media, config.plan.max_patches)
        self._encoder = SampleEncoder(tokenizer, config.template, media, config.plan.max_tokens, config.vision_ids)
        self._clips = ClipDecoder(config.media.video_backend, config.media.decode_timeout_s)
        self._tasks: dict[str, int] = {}
        self._samples: dict[tuple[int, int, int, int], CountedSample] = {}
        self._items: Iterator[Item] = iter(())  # replaced at the first pack

    def next_pack(self) -> StreamedPack:
        """The next pack of this rank, with its samples and what was lost on the way."""
        while self._phase + 1 < len(self.phases) and self._tokens >= self.phases[self._phase + 1].from_tokens:
            self._phase += 1
            self._items = self._draw_items(Mixture(self.phases[self._phase].weights))
        items = self._packer.next_pack(self._items)
        samples = []
        for item in items:
            samples.append(self._samples.pop(item[:4]))
            self._streams[item.source].leave(item.epoch, item.shard)
        tokens, patches = sum(item.tokens for item in items), sum(item.patches for item in items)
        self._tokens += tokens * self._world  # what the other ranks pack is alike
        self._number += 1
        events = tuple(event for stream in self._streams for event in stream.events)
        ended = tuple((stream.name, *place) for stream in self._streams for place in stream.ended)
        for stream in self._streams:
            stream.events.clear()
            stream.ended.clear()
        return StreamedPack(self._number - 1, tuple(items), tokens, patches, events, (), tuple(samples), ended)

    def close(self) -> None:
        """Close the shards under way, and end the clip decoder, if one was started."""
        self._clips.close()
        for stream in self._streams:
            stream.close()

    def _draw_items(self, mixture: Mixture) -> Iterator[Item]:
        for number in mixture.draws():
            stream = self._streams[number]
            while True:
                opened, raw = stream.next_sample()
                try:
                    item = self._count(raw, number, opened)
                except DataError as error:
                    stream.tell(error)
                    continue
                stream.enter(opened)
                yield item
                break

    def _count(self, raw: RawSample, number: int, opened: _OpenShard) -> Item:
        """What the sample takes; it is kept for its pack.

        Raises:
            DataError: it cannot be used, or does not fit a pack.
        """
        file = SampleFile(raw)
        record = read_record(raw.key, file.members, file)
        facts = probe_media(record, file.members, file, self._clips)
        record = with_media(record, facts)
        opened.facts.add(record)
        counts = self._encoder.count(record)
        pairs = sum(t * (h * w) ** 2 for t, h, w in (media.grid_thw for media in counts.plans))
        by_task = self._config.plan.packing == "task"
        task = self._tasks.setdefault(record.task, len(self._tasks)) if by_task else 0
        place = (number, opened.shard, opened.rows - 1, opened.epoch)
        self._samples[place] = CountedSample(raw, facts)
        return Item(*place, counts.num_tokens, counts.num_patches, pairs, task)


def _no_sizes() -> Sequence[int]:
    raise UserError(
        "epochs and size_temperature need the sources' sizes, which reader=webdataset does not know: state weights, or "
        "use reader=index"
    )
