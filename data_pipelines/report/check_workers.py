"""Processes that check shards and are replaced when a sample ends or stalls them.

Enters: parts of shards. Leaves: progress of samples with their findings, as they come. A decoder that crashes in C, or
never returns, costs its process; the sample is a finding, and the part goes on behind it in a new process.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from data_pipelines.report.check_shard import CheckSettings, Finding, PartChecker, ShardPart

WHOLE = -1  # the number under which a part reports on the shard as a whole, before its samples
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Checked:
    """One sample done (or, with number -1, the shard as a whole): its bytes and what is wrong with it."""

    number: int
    num_bytes: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _At:
    number: int
    key: str


@dataclass(slots=True)
class _Worker:
    process: ForkProcess
    pipe: Connection
    part: ShardPart | None = None
    at: _At = field(default_factory=lambda: _At(WHOLE, ""))
    since: float = 0.0


def check_parts(
    parts: Sequence[ShardPart], settings: CheckSettings, processes: int, timeout_s: float
) -> Generator[Checked, None, None]:
    """Check `parts` in `processes` processes; a sample that takes longer than `timeout_s` seconds is a finding.

    All processes are gone when the iterator ends or is closed.
    """
    waiting = deque((part, WHOLE) for part in parts)
    workers = [_start(settings) for _ in range(min(processes, len(parts)))]
    try:
        while waiting or any(worker.part for worker in workers):
            for worker in workers:
                if worker.part is None and waiting:
                    _hand_out(worker, *waiting.popleft())
            ready = wait([worker.pipe for worker in workers if worker.part], timeout=_POLL_S)
            for number, worker in enumerate(workers):
                if worker.pipe in ready:
                    try:
                        message = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        code = worker.process.exitcode
                        yield _lost(worker, "decoder_crashed", f"ended the process that read it (exit {code})", waiting)
                        workers[number] = _replace(worker, settings)
                        continue
                    if isinstance(message, Checked):
                        yield message
                    elif isinstance(message, _At):
                        worker.at, worker.since = message, time.monotonic()
                    else:
                        worker.part = None
                elif worker.part and time.monotonic() - worker.since > timeout_s:
                    yield _lost(worker, "deadline", f"not read within {timeout_s:g} s", waiting)
                    workers[number] = _replace(worker, settings)
    finally:
        for worker in workers:
            _end(worker)


def _start(settings: CheckSettings) -> _Worker:
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours, settings, os.getpid()), daemon=True, name="check")
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _hand_out(worker: _Worker, part: ShardPart, begin: int) -> None:
    worker.part, worker.at, worker.since = part, _At(begin, ""), time.monotonic()
    worker.pipe.send((part, begin))


def _lost(worker: _Worker, reason: str, message: str, waiting: deque[tuple[ShardPart, int]]) -> Checked:
    """The sample a worker was at as a finding; the rest of its part is to be done next.

    A worker sent on to a sample that never told its key was lost while it scanned the shard: so would the next one be.
    """
    assert worker.part is not None
    finding = Finding.of(worker.part.shard, worker.at.key, reason, message)
    if worker.at.number == WHOLE or worker.at.key:
        waiting.appendleft((worker.part, worker.at.number + 1))
    return Checked(worker.at.number, 0, (finding,))


def _replace(worker: _Worker, settings: CheckSettings) -> _Worker:
    _end(worker)
    return _start(settings)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection, parents_end: Connection, settings: CheckSettings, parent: int) -> None:
    """A worker's life: parts in, progress out, until the parent closes the pipe or dies."""
    parents_end.close()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    while True:
        while not pipe.poll(_POLL_S):
            if os.getppid() != parent:
                return
        try:
            part, begin = pipe.recv()
        except EOFError:
            return
        checker = PartChecker(part, settings)
        if begin == WHOLE:
            pipe.send(_At(WHOLE, ""))
            pipe.send(Checked(WHOLE, 0, tuple(checker.whole(lambda: pipe.send(_At(WHOLE, ""))))))
        for number in range(max(begin, 0), len(checker.keys)):
            pipe.send(_At(number, checker.keys[number]))
            pipe.send(Checked(number, checker.size(number), tuple(checker.check(number))))
        checker.close()
        pipe.send(None)
