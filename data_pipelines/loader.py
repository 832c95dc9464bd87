"""The data way put together: index → plan → read, decode, encode → collate, in workers, as packs of this rank.

Enters: a stage's `DataConfig`, the tokenizer, rank and world. Leaves: per global step this rank's `PackedBatch`es.
Step s takes packs [s*B, (s+1)*B) of the plan (B packs_per_step), in plan order or, given a cost, the dearest first;
micro-step m of rank r is number m*world + r of them. So a step's packs are the same whatever the world size or the
number of workers, and the loader's state is the plan's. Every rank runs the whole plan (lengths only) and decodes its
own packs.

A sample that fails leaves its pack and becomes a `LedgerEvent` in `batch.events`; the plan does not move.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from multiprocessing import parent_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.config import DataConfig
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.errors import DataError, PlanMismatch
from data_pipelines.index.build import Counting, Progress, build_missing
from data_pipelines.index.source import SourceIndex
from data_pipelines.pack.collate import collate
from data_pipelines.plan.balance import PackCost, order_by_cost
from data_pipelines.plan.mixture import mixture_phases
from data_pipelines.plan.packer import Item
from data_pipelines.plan.planner import Pack, Planner
from data_pipelines.samples import Encoded, LedgerEvent, PackedBatch
from data_pipelines.shards.storage import expand_shards
from data_pipelines.tokenizer import TextTokenizer

STATE_VERSION = 1
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def open_sources(
    config: DataConfig, tokenizer: TextTokenizer, processes: int | None = None, progress: Progress | None = None
) -> list[SourceIndex]:
    """The sources of a mixture with all their indices built, in the order of `config.sources`.

    Raises:
        ShardError: a pattern that names no shard, or a shard that cannot be read.
    """
    counting = Counting(tokenizer, config.template)
    sources = [
        SourceIndex(name, expand_shards(name, source.shards), counting) for name, source in config.sources.items()
    ]
    shards = dict.fromkeys(shard for source in sources for shard in source.shards)
    build_missing(list(shards), counting, processes, progress)
    return sources


def new_planner(config: DataConfig, sources: list[SourceIndex], seed: int) -> Planner:
    """The plan of a mixture, at its beginning."""
    phases = mixture_phases(
        list(config.sources.values()), lambda: [source.num_samples for source in sources], config.plan.size_temperature
    )
    return Planner(sources, phases, config.media, config.plan, seed)


class PackLoader:
    """This rank's packs, step after step, without end. Use it once per process; `close()` ends its workers.

    `dataset_names[i]` is the name of dataset number i in the batches. `cost` (of the model) lets packs of like cost
    share a micro-step, so that ranks wait less for one another; it changes the order inside a step only.
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
        progress: Progress | None = None,
        cost: PackCost | None = None,
    ) -> None:
        if packs_per_step % world or packs_per_step < 1:
            raise ValueError(
                f"packs_per_step={packs_per_step} is not a multiple of the world size {world}: every rank takes the "
                f"same number of packs; use packs_per_step={-(-max(1, packs_per_step) // world) * world} or other ranks"
            )
        if not config.sources:
            raise ValueError("data.sources is empty: name at least one source with its shards")
        self.dataset_names = tuple(config.sources)
        self._config, self._tokenizer, self._pin_memory = config, tokenizer, pin_memory
        self._packs_per_step, self._rank, self._world, self._seed = packs_per_step, rank, world, seed
        self._cost = cost
        self._sources = open_sources(config, tokenizer, progress=progress)
        self._planner = self._new_planner()
        self._state = self._planner.state_dict()
        self._loader: DataLoader[PackedBatch] | None = None
        self._batches: Iterator[PackedBatch] | None = None

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Steps from the current state on; each is this rank's packs in slot order."""
        self.close()
        planner = self._new_planner()
        planner.load_state_dict(self._state)
        ahead: deque[dict[str, Any]] = deque()
        sampler = _PlanSampler(planner, self._packs_per_step, self._rank, self._world, self._cost, ahead)
        settings = self._config.loader
        self._loader = DataLoader(
            _PackDataset(self._sources, self._config, self._tokenizer),
            sampler=sampler,
            batch_size=None,
            num_workers=settings.num_workers,
            prefetch_factor=settings.prefetch_factor if settings.num_workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            pin_memory=self._pin_memory,
        )
        self._batches = iter(self._loader)
        while self._batches is not None:
            step = [next(self._batches) for _ in range(self._packs_per_step // self._world)]
            # What counts as done is what was handed out; packs that workers hold ready are planned again on a resume.
            self._state = ahead.popleft()
            yield step

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out: JSON-able, the same on every rank, readable under any world size."""
        return {"version": STATE_VERSION, "identity": self._identity(), "plan": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state` was taken; call it before iterating.

        Raises:
            ValueError: the state belongs to other data, budgets or seed; the message names what differs.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"loader state of version {state.get('version')}, this program reads {STATE_VERSION}")
        mine, theirs = self._identity(), state["identity"]
        changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if changed:
            listed = "; ".join(f"{name}: was {theirs.get(name)}, is {mine.get(name)}" for name in changed)
            raise ValueError(
                f"cannot continue the data exactly, the settings differ: {listed}. Restore them, or start anew"
            )
        self._planner.load_state_dict(state["plan"])
        self._state = self._planner.state_dict()

    def close(self) -> None:
        """End the workers. Iterating again starts them anew from the current state."""
        batches, self._batches, self._loader = self._batches, None, None
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def _new_planner(self) -> Planner:
        return new_planner(self._config, self._sources, self._seed)

    def _identity(self) -> dict[str, Any]:
        """What decides the plan besides its state."""
        config = self._config
        mixture = {name: [source.weight, source.epochs, source.schedule] for name, source in config.sources.items()}
        return {
            "seed": self._seed,
            "template": config.template,
            "tokenizer": self._tokenizer.fingerprint,
            "media": repr(config.media),
            "plan": repr(config.plan),
            **{
                f"source {source.name}": [len(source.shards), source.fingerprint, repr(mixture[source.name])]
                for source in self._sources
            },
        }


class _PlanSampler(Sampler[Pack]):
    """The plan as a DataLoader's sampler: this rank's packs in order. The state after each step goes to `ahead`."""

    def __init__(
        self,
        planner: Planner,
        packs_per_step: int,
        rank: int,
        world: int,
        cost: PackCost | None,
        ahead: deque[dict[str, Any]],
    ) -> None:
        self._planner, self._packs_per_step, self._rank, self._world = planner, packs_per_step, rank, world
        self._cost, self._ahead = cost, ahead

    def __iter__(self) -> Iterator[Pack]:
        while True:
            packs = [self._planner.next_pack() for _ in range(self._packs_per_step)]
            self._ahead.append(self._planner.state_dict())
            if self._cost is not None:
                packs = order_by_cost(packs, self._cost)
            yield from packs[self._rank :: self._world]


class _PackDataset(Dataset[PackedBatch]):
    """Pack → batch. Stateless: what it returns depends on the pack alone."""

    def __init__(self, sources: list[SourceIndex], config: DataConfig, tokenizer: TextTokenizer) -> None:
        self._sources, self._special = sources, tokenizer.special
        self._max_tokens = config.plan.max_tokens
        self._encoder = SampleEncoder(tokenizer, config.template, config.media, config.plan.max_tokens)

    def __getitem__(self, pack: Pack) -> PackedBatch:
        """Read, decode, encode and collate one pack; failing samples become events."""
        documents, events = [], list(pack.events)
        for item in pack.items:
            name = self._sources[item.source].name
            try:
                document, notes = self._encode(item)
                documents.append(document)
                events += [LedgerEvent(name, note.key, note.reason, note.message) for note in notes]
            except DataError as error:
                events.append(LedgerEvent(name, error.key, error.reason, error.message))
            except PlanMismatch as error:
                events.append(LedgerEvent(name, self._key(item), "plan_mismatch", f"defect of this program: {error}"))
            except Exception as error:
                # Decoders raise what they like on broken bytes; one sample must not end a run. It is counted by type.
                message = f"{type(error).__name__}: {error}"
                events.append(LedgerEvent(name, self._key(item), "unexpected_error", message))
        return collate(pack.number, documents, self._special, self._max_tokens, events)

    def _encode(self, item: Item) -> tuple[Encoded, list[LedgerEvent]]:
        record, read_member = self._sources[item.source].read(item.shard, item.row)
        document, notes = self._encoder.encode(record, read_member, item.source)
        tokens, patches = int(document.input_ids.shape[0]), sum(plan.num_patches for plan in document.media)
        if (tokens, patches) != (item.tokens, item.patches):
            raise PlanMismatch(
                f"{record.key}: planned {item.tokens} tokens, {item.patches} patches; {tokens}, {patches}"
            )
        return document, notes

    def _key(self, item: Item) -> str:
        return self._sources[item.source].key(item.shard, item.row)


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    """One thread a worker; signals for the whole process group are the parent's business, which ends its workers.

    A parent that is killed cannot: on Linux the kernel ends the worker with it, at once instead of at torch's next look
    after 5 s. (The signal follows the thread that made the worker; a loader is iterated in its process's main thread.)
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it died before the line above: nobody would ever end this worker
