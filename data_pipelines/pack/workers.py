"""Worker processes that make batches in order, and are replaced when they die or hang.

Enters: packs. Leaves: their batches, in the order of the packs. Both travel through slots of shared memory, only places
and sizes through pipes, so neither side ever blocks on a full pipe. Memory is bounded: `ahead` slots, each sized for
the largest pack the budgets allow and touched only as far as it is used. Packs that bring stored bytes along may need
more than that: it is given back with their batch, and only so many are under way that it stays within a bound. It is
anonymous: it does not count against /dev/shm (64 MB in a container by default), and nothing can be left behind.

Why not torch's DataLoader: its death handler raises in the training step instead of where data is asked for, one dead
or stuck worker ends the whole loader, and a worker that hangs in C blocks the parent without a deadline.

A worker that dies is replaced and its pack made again; the sample it was at is kept once (a kill from outside is no
fault of the data) and left out the second time. A sample over its deadline is left out at once. Both are events.
A worker that stalls before its first sample (no byte of its shards comes, a dead mount holds it) blames no sample: it
is replaced once, then the run ends with the names of the pack's shards.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
import torch

from data_pipelines.errors import ShardError
from data_pipelines.pack.slots import read_batch, write_batch
from data_pipelines.plan.planner import Pack
from data_pipelines.samples import LedgerEvent, PackedBatch

MakeBatch = Callable[[Any], PackedBatch]
MakeReader = Callable[[Callable[[int], None]], MakeBatch]

NameSample = Callable[[Any, int], tuple[str, str]]
NameShards = Callable[[Any], str]

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 1.0
_MAX_DEATHS_OUTSIDE_SAMPLES = 3
_MAX_STALLS = 1
_KILL_S = 10.0  # a killed process that hangs in the kernel stays until its device answers: it is left to that
IDLE, PREPARING = -1, -2  # items that are no sample: nothing to do, or before the first sample


@dataclass(slots=True)
class _Ticket:
    """A pack that was given to worker `worker` and will be written into slot `slot`; `reply` when it is done.

    `surplus` bytes of the slot were used beyond what a batch needs.
    """

    pack: Pack
    slot: int
    worker: int
    reply: Any = None
    surplus: int = 0


@dataclass(slots=True)
class _Worker:
    process: ForkProcess
    pipe: Connection
    waiting: deque[_Ticket]


class WorkerPool:
    """`num_workers` processes that read packs. `make_reader(watch)` is called once in each; it returns pack → batch.

    At most `ahead` packs are under way or wait to be taken. `slot_bytes` bounds the tensors of one pack. `room` more
    bytes of a slot are for what a pack brings along; all packs under way, if more than one, use `max_surplus` of those.
    A worker is late that takes longer than `sample_timeout_s` for a sample, or is silent for `stall_s` before a pack's
    first one.
    `name_sample(pack, i)` gives (dataset, key) of a sample for the ledger, `name_shards(pack)` where its samples lie,
    for an error.

    Raises (from `next`):
        RuntimeError: a worker's program fails (not a sample), with its traceback.
        ShardError: workers stall before a pack's first sample (reason "stalled_shard").
    """

    def __init__(
        self,
        make_reader: MakeReader,
        name_sample: NameSample,
        num_workers: int,
        ahead: int,
        slot_bytes: int,
        sample_timeout_s: float,
        stall_s: float,
        pin_memory: bool = False,
        name_shards: NameShards = lambda pack: f"pack {pack.number}",
        room: int = 0,
        max_surplus: int = 0,
    ) -> None:
        self.closed = False
        self._make_reader, self._name_sample, self._name_shards = make_reader, name_sample, name_shards
        self._sample_timeout_s, self._stall_s, self._pin_memory = sample_timeout_s, stall_s, pin_memory
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._max_surplus = max_surplus
        self._slots = [mmap.mmap(-1, self._slot_bytes + room) for _ in range(ahead)]
        self._free = list(range(len(self._slots)))
        # What each worker is at: pack number (-1: none yet), item (or `IDLE`, `PREPARING`), and when it began, in ns
        # of the monotonic clock.
        self._at = np.frombuffer(mmap.mmap(-1, num_workers * 24), np.int64).reshape(num_workers, 3)
        self._tickets: deque[_Ticket] = deque()
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._workers = [self._start(number) for number in range(num_workers)]

    @property
    def has_room(self) -> bool:
        """Whether another pack can be submitted before one is taken."""
        return bool(self._free)

    @property
    def is_busy(self) -> bool:
        """Whether a pack was submitted and not yet taken."""
        return bool(self._tickets)

    @property
    def is_next_ready(self) -> bool:
        """Whether `next` has not to wait."""
        return bool(self._tickets) and self._tickets[0].reply is not None

    def fits(self, pack: Pack) -> bool:
        """Whether there is memory for what `pack` brings along: always for one alone."""
        surplus = max(0, pack.stored_bytes - self._slot_bytes)
        used = sum(ticket.surplus for ticket in self._tickets)
        return self.has_room and (not surplus or not self._tickets or used + surplus <= self._max_surplus)

    def submit(self, pack: Pack) -> None:
        """Give `pack` to the worker with the least to do."""
        number = min(range(len(self._workers)), key=lambda n: (len(self._workers[n].waiting), n))
        ticket = _Ticket(pack, self._free.pop(), number)
        self._tickets.append(ticket)
        self._send(ticket)

    def next(self) -> PackedBatch:
        """The batch of the oldest pack submitted and not yet taken; waits for it."""
        ticket = self._tickets[0]
        while ticket.reply is None:
            self.wait()
        self._tickets.popleft()
        status, content = ticket.reply
        if status == "error":
            raise RuntimeError(f"a data worker failed at pack {ticket.pack.number}:\n{content}")
        batch = read_batch(content, self._slots[ticket.slot], self._pin_memory)
        if ticket.surplus:
            _give_back(self._slots[ticket.slot], self._slot_bytes)
        self._free.append(ticket.slot)
        batch.events = (*ticket.pack.events, *batch.events)
        return batch

    def under_way(self) -> list[str]:
        """What each busy worker is at: sample, pack, process and for how long. From any thread, while `next` waits."""
        busy = [(number, worker) for number, worker in enumerate(self._workers) if worker.waiting]
        return [self._place(number, worker) for number, worker in busy]

    def _place(self, number: int, worker: _Worker) -> str:
        pack = worker.waiting[0].pack
        pack_number, item, since = (int(value) for value in self._at[number])
        if pack_number != pack.number or item == IDLE:
            what = "has not begun"
        elif item == PREPARING:
            what = "before the first sample of"
        else:
            what = f"{'/'.join(self._name_sample(pack, item))} of"
        still_s = (time.monotonic_ns() - since) / 1e9
        return f"{what} pack {pack.number} (data worker {number}, process {worker.process.pid}, for {still_s:.0f} s)"

    def close(self) -> None:
        """End all workers within seconds, whatever they are at."""
        self.closed = True
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(2)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(_KILL_S)
            worker.pipe.close()
        self._workers.clear()
        self._tickets.clear()
        self._slots.clear()  # their memory goes with the last mapping
        self._free.clear()

    def _start(self, number: int, waiting: Sequence[_Ticket] = ()) -> _Worker:
        context = get_context("fork")
        ours, theirs = context.Pipe()
        self._at[number] = (-1, PREPARING, time.monotonic_ns())
        process = context.Process(
            target=_serve,
            args=(number, theirs, ours, self._make_reader, self._slots, self._at, os.getpid()),
            daemon=True,
            name=f"data-worker-{number}",
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, deque(waiting))

    def _send(self, ticket: _Ticket) -> None:
        worker = self._workers[ticket.worker]
        worker.waiting.append(ticket)
        data = pickle.dumps(replace(ticket.pack, events=()), pickle.HIGHEST_PROTOCOL)
        ticket.surplus = max(0, len(data) - self._slot_bytes)
        self._slots[ticket.slot][: len(data)] = data
        try:
            worker.pipe.send((ticket.slot, len(data)))
        except OSError:
            return  # it died: noticed, and sent again, where batches are waited for

    def wait(self, also: Sequence[Connection] = ()) -> None:
        """Take replies as they come; replace workers that died or are over the deadline. Returns after one of these, a
        second, or as soon as there is something in a pipe of `also`.
        """
        ready = wait([*also, *(worker.pipe for worker in self._workers)], timeout=_POLL_S)
        for number, worker in enumerate(self._workers):
            if worker.pipe in ready:
                try:
                    reply = worker.pipe.recv()
                except (EOFError, OSError):
                    self._replace(number)
                    continue
                worker.waiting.popleft().reply = reply
            elif (late := self._late_at(number)) is not None:
                self._replace(number, late)

    def _late_at(self, number: int) -> tuple[int, int] | None:
        """The (pack, item) at which worker `number` is over its deadline; None: it is in time."""
        at = pack_number, item, since = [int(value) for value in self._at[number]]
        deadlines = {IDLE: float("inf"), PREPARING: self._stall_s}
        late = time.monotonic_ns() - since > deadlines.get(item, self._sample_timeout_s) * 1e9
        # Read again: the worker writes its place while we read it.
        return (pack_number, item) if late and [int(value) for value in self._at[number]] == at else None

    def _replace(self, number: int, late: tuple[int, int] | None = None) -> None:
        """Start worker `number` anew with the packs it had; the sample it was at is noted, or left out where `late`.

        `late` is the place that was judged: by the time the worker is dead it may have gone on to an innocent sample.
        """
        worker = self._workers[number]
        worker.process.kill()
        worker.process.join(_KILL_S)
        worker.pipe.close()
        code = worker.process.exitcode
        pack_number, item = late or (int(value) for value in self._at[number][:2])
        if worker.waiting:
            ticket = worker.waiting[0]
            at = item if pack_number == ticket.pack.number or item == PREPARING else IDLE
            ticket.pack = self._note_death(ticket.pack, at, late is not None, code)
        self._workers[number] = self._start(number)
        for ticket in list(worker.waiting):
            self._send(ticket)

    def _note_death(self, pack: Pack, item: int, late: bool, code: int | None) -> Pack:
        """The pack to be made again: with an event, and without the sample if it is at fault."""
        self._deaths[pack.number, item] += 1
        deaths = self._deaths[pack.number, item]
        if late and item < 0:
            return self._note_stall(pack, deaths)
        if late:
            message = f"took longer than sample_timeout_s={self._sample_timeout_s:g}"
            return replace(pack, skipped=(*pack.skipped, (item, "deadline", message)))
        if item >= 0 and deaths > 1:
            return replace(
                pack, skipped=(*pack.skipped, (item, "worker_died", f"ended its worker twice (exit {code})"))
            )
        if item < 0 and deaths > _MAX_DEATHS_OUTSIDE_SAMPLES:
            raise RuntimeError(
                f"data workers die at pack {pack.number} outside any sample (exit {code}); out of memory?"
            )
        dataset, key = self._name_sample(pack, item) if item >= 0 else ("", f"pack {pack.number}")
        event = LedgerEvent(
            dataset, key, "worker_replaced", f"its worker died (exit {code}) and the pack was made again"
        )
        return replace(pack, events=(*pack.events, event))

    def _note_stall(self, pack: Pack, stalls: int) -> Pack:
        """The pack to be made again after a worker that reached no sample of it in time."""
        waited = f"within {self._stall_s:g} s"
        if stalls > _MAX_STALLS:
            message = (
                f"no worker could begin pack {pack.number} {waited}, in {stalls} tries: does their storage answer?"
            )
            raise ShardError(self._name_shards(pack), "stalled_shard", message)
        message = f"its worker reached no sample {waited}, and the pack was made again"
        event = LedgerEvent("", f"pack {pack.number}", "worker_replaced", message)
        return replace(pack, events=(*pack.events, event))


def _give_back(slot: mmap.mmap, start: int) -> None:
    """Free the slot's memory from `start` on; unmapping it would not, for the workers have it mapped, too."""
    if hasattr(mmap, "MADV_REMOVE"):  # Linux
        slot.madvise(mmap.MADV_REMOVE, start, len(slot) - start)


def _serve(
    number: int,
    pipe: Connection,
    parents_end: Connection,
    make_reader: MakeReader,
    slots: Sequence[mmap.mmap],
    at: np.ndarray,
    parent: int,
) -> None:
    """A worker's life: packs in, batches out, until the parent closes the pipe or dies."""
    isolate(parent)
    parents_end.close()
    current = -1

    def watch(item: int) -> None:
        at[number] = (current, item, time.monotonic_ns())

    read = make_reader(watch)
    watch(IDLE)
    while True:
        while not pipe.poll(_POLL_S):
            if os.getppid() != parent:
                return
        try:
            slot, size = pipe.recv()
        except EOFError:
            return
        pack: Pack = pickle.loads(slots[slot][:size])
        current = pack.number
        watch(PREPARING)
        reply: tuple[str, Any]
        try:
            reply = ("batch", write_batch(read(pack), slots[slot]))
        except Exception:
            reply = ("error", traceback.format_exc()[-8000:])
        watch(IDLE)
        pipe.send(reply)


def isolate(parent: int) -> None:
    """One thread a worker; Ctrl-C is the parent's business, which ends its workers; a killed parent takes them along.

    The kernel's signal follows the thread that forked the worker, so a pool is used from its process's main thread.
    """
    torch.set_num_threads(1)
    gc.freeze()  # a collection would touch, and so copy, the pages of all that came with the fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above: nobody would ever end this worker
