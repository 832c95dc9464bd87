"""The watchdog: no rank hangs in silence.

Enters: notes of what each rank is doing. Leaves, when a rank makes no progress for too long: a report that names it,
what it was doing, its sample keys and its Python stack, on stderr and in `stall.txt`; then every rank ends with code
76. Costs a message to the rendezvous store per note (20 to 80 µs; not waited for, and sent by the main thread, so
that the note is out even if the process is stopped the moment after) and one per tick from a thread of its own. No
collective is used, since collectives are what hangs.

Who stalls: all ranks stop together, one because it is stuck, the others in a collective that waits for it. Every rank
makes the same notes in the same order, so the stuck one has made fewest; among equals it is the one whose main thread
is not inside a collective. A process that is stopped, or whose C code holds the interpreter, stops sending altogether.

The last resort needs neither a thread nor another rank: each note sets the process's alarm clock to its limit and what
ending the run takes. SIGALRM writes the Python stacks to stderr from C, and ends the process (128 + 14 to a shell).
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from torch._C._distributed_c10d import Store

from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import WatchdogConfig
from qwen2vl_train.training.failure import (
    FAILURE_PREFIX,
    claim_first_cause,
    describe_failure,
    leave_store,
    name_failure,
    name_first_cause,
    read_first_cause,
)
from qwen2vl_train.training.launcher import leave_for_torchrun
from qwen2vl_train.training.stopping import EXIT_STALLED
from qwen2vl_train.training.world import World

_COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/")
_STDERR = 2  # written to from C
_PATIENCE_TICKS = 3
_FAILURE_GRACE_S = 5.0
_ANSWER_S = 20.0  # the store's own limit for connecting and waiting
_EXIT_S = 120.0  # what a rank still says and waits for (failure.py: about 60 s), and the interpreter's end
_STACKS_S = 1.0  # to write stacks

T = TypeVar("T")
Keys = Sequence[str] | Callable[[], Sequence[str]]


@dataclass(frozen=True)
class Beat:
    """What one rank last told the others. `notes` counts its notes; `stack` is there once it is overdue."""

    rank: int
    host: str
    pid: int
    tick: int = 0
    notes: int = 0
    activity: str = "starting"
    keys: tuple[str, ...] = ()
    still_s: float = 0.0
    stack: str = ""

    @property
    def in_collective(self) -> bool:
        """Its main thread waits for other ranks: the innermost Python frame is PyTorch's or DeepSpeed's."""
        innermost = self.stack.rpartition('  File "')[2]
        return any(file in innermost for file in _COLLECTIVE_FILES)


class Watchdog:
    """Entered around a whole run; `note` at each change of activity. Main thread only.

    Where another rank fails, it also ends this one, which may wait for that rank in a collective (NCCL's never end),
    and where the launcher's process has died; both with `stall_s` 0, too, where no rank ever counts as stalled.
    A process that is stopped (SIGSTOP) past its limit ends as it goes on. Once left, the process has `_EXIT_S` to end.
    """

    def __init__(self, config: WatchdogConfig, world: World, folder: Path | None) -> None:
        """Keep reports and stacks in `folder`; with None they go to stderr alone."""
        self._world = world
        self._folder = folder
        self._beat = Beat(world.rank, socket.gethostname(), os.getpid())
        self._stall_s = config.stall_s or math.inf
        self._ask_keys: Callable[[], Sequence[str]] | None = None
        self._since, self._limit_s = time.monotonic(), self._stall_s
        self._tick_s = min(5.0, max(0.2, self._stall_s / 10))
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread: threading.Thread | None = None
        self._talker = ThreadPoolExecutor(1, "watchdog-store")
        self._ticks = 0  # counted by the thread; `_beat` is written by the main thread alone
        self._notes: Store | None = None  # a connection that the thread's waiting for answers never blocks

    def __enter__(self) -> Self:
        faulthandler.register(signal.SIGALRM, file=_STDERR, chain=True)  # the stacks, then its default: the end
        self._notes = self._world.connect_store("watchdog")
        self.note("starting")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set_alarm(_EXIT_S)
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._talker.shutdown(wait=False)

    def note(self, activity: str, keys: Keys = (), limit_s: float | None = None) -> None:
        """This rank now does `activity` (with the samples `keys`), for at most `limit_s` seconds (None: `stall_s`).

        `keys` may be a function that tells them: it is called from a thread, once this rank is overdue.
        Every rank must make the same notes in the same order. With `limit_s` infinite the ranks must meet before the
        next note: whoever has made it waits under its limit.
        """
        # the clock first: the thread, which reads the beat first, never sees the new note as old as the one before
        self._since = time.monotonic()
        self._limit_s = limit_s if limit_s and math.isfinite(self._stall_s) else self._stall_s
        self._ask_keys = keys if callable(keys) else None
        # the thread needs so long to see it, judge and tell; where it cannot, the alarm ends the process
        self._set_alarm(self._limit_s + (_PATIENCE_TICKS + 1) * self._tick_s + 2 * _ANSWER_S)
        known = () if callable(keys) else tuple(keys)
        self._beat = replace(self._beat, notes=self._beat.notes + 1, activity=activity, keys=known)
        if self._notes is not None:
            try:
                self._send(self._notes, replace(self._beat, tick=self._ticks))
            except RuntimeError:
                self._notes = None  # the thread says that the store is gone

    def note_pack(self, activity: str, pack: PackedBatch) -> None:
        """`note` for one pack."""
        self.note(f"{activity} of pack {pack.number}", pack.keys)

    def _limit(self) -> str:
        """This rank's limit, for people."""
        return f"{self._limit_s:.0f} s (watchdog.{'stall_s' if self._limit_s == self._stall_s else 'save_s'})"

    def _set_alarm(self, after_s: float) -> None:
        """End the process by SIGALRM in `after_s` seconds, whatever holds it; never where no rank counts as stalled."""
        watched = math.isfinite(self._stall_s) and math.isfinite(after_s)
        signal.setitimer(signal.ITIMER_REAL, after_s if watched else 0)

    def _watch(self) -> None:
        """The thread: send beats; when this rank is overdue, find out with the others who stalls, tell and end."""
        try:
            store, failures = self._world.connect_store("watchdog"), self._world.connect_store(FAILURE_PREFIX)
            while not self._ended.wait(self._tick_s):
                self._end_if_orphaned(failures)
                first = self._ask(lambda: read_first_cause(failures))
                if first is not None and not self._ended.wait(_FAILURE_GRACE_S):
                    self._end_after(first, failures)
                beat = self._ask(lambda: self._tick(store))
                if beat.still_s > self._limit_s:
                    self._end_run(store, beat.notes)
        except Exception as error:  # whatever it is: without this thread a stalled rank would never end
            self._watch_alone(error)

    def _ask(self, talk: Callable[[], T]) -> T:
        """What `talk`, which asks the store, answers; from yet another thread, since only connecting has a time limit.

        Cut off from the store's host, its client would wait for an answer until TCP gives up, a quarter of an hour.
        """
        return self._talker.submit(talk).result(_ANSWER_S)

    def _watch_alone(self, error: Exception) -> None:
        """The store went with its host, or that is what is stuck: the others cannot be asked any more."""
        why = str(error) or f"nothing within {_ANSWER_S:.0f} s"
        with suppress(OSError):
            print(f"rank {self._world.rank}: the rendezvous store does not answer ({why})", file=sys.stderr, flush=True)
        while not self._ended.wait(self._tick_s):
            self._end_if_orphaned(None)
            if time.monotonic() - self._since > self._limit_s:
                beat = self._look_closer(self._beat, time.monotonic() - self._since)
                text = describe_stall({self._world.rank: beat}, set(), self._limit())
                self._end_process(
                    f"{text}\nThe store at {os.environ['MASTER_ADDR']} does not answer: look there first."
                )

    def _tick(self, store: Store) -> Beat:
        """Send one beat, with stack and keys once this rank is overdue."""
        self._ticks += 1
        beat = self._beat
        still_s = time.monotonic() - self._since
        beat = replace(beat, tick=self._ticks, still_s=still_s)
        if still_s > self._limit_s:
            beat = self._look_closer(beat, still_s)
        self._send(store, beat)
        return beat

    def _send(self, store: Store, beat: Beat) -> None:
        store.set(f"beat/{self._world.rank}", json.dumps(vars(beat)))

    def _look_closer(self, beat: Beat, still_s: float) -> Beat:
        """`beat` with the main thread's stack, and the samples where the note left them to be asked for."""
        keys, ask = beat.keys, self._ask_keys
        if ask is not None:
            try:
                keys = tuple(ask())
            except Exception as error:  # the main thread may have gone on meanwhile; a report without them is one, too
                keys = (f"could not be told ({error})",)
        return replace(beat, still_s=still_s, keys=keys, stack=self._stack())

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return "".join(traceback.format_stack(frame)[-25:]) if frame else ""

    def _end_run(self, store: Store, notes: int) -> None:
        """Give the others time to send their stacks, judge, report once, end this process; not if `notes` grow."""
        before = self._ask(lambda: self._read(store))
        for _ in range(_PATIENCE_TICKS):
            if self._ended.wait(self._tick_s) or self._beat.notes != notes:
                return  # it moved after all
            self._ask(lambda: self._tick(store))
        beats = self._ask(lambda: self._read(store))
        silent = {rank for rank, beat in beats.items() if beat.tick == before.get(rank, beat).tick and rank in before}
        silent |= set(range(self._world.size)) - set(beats)
        speaker = min((rank for rank in beats if rank not in silent), default=self._world.rank)
        if speaker == self._world.rank:
            text = describe_stall(beats, silent, self._limit())
            if self._folder is not None:
                with suppress(OSError):
                    self._folder.mkdir(parents=True, exist_ok=True)
                    with (self._folder / "stall.txt").open("a") as file:
                        file.write(f"{text}\n")
            self._ask(lambda: store.set("reported", text))
        else:
            text = self._ask(lambda: store.get("reported").decode())  # waits for it
        _end_here([beats[rank] for rank in silent & set(beats)], text)
        self._end_process(text, say=speaker == self._world.rank)

    def _end_process(self, report: str, say: bool = True) -> NoReturn:
        """Nothing but this ends a main thread that waits inside a collective."""
        try:
            leave_for_torchrun(report, time.time())
            if say:
                print(report, file=sys.stderr, flush=True)
            self._keep_stacks()
        finally:  # also where the disk is full
            os._exit(EXIT_STALLED)

    def _keep_stacks(self) -> None:
        """This process's stacks, added to those of earlier stalls in the folder; without room for it, on stderr."""
        if self._folder is not None:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with (self._folder / f"stacks-rank{self._world.rank}.txt").open("a") as file:
                    print(f"--- {time.strftime('%F %T')}: process {os.getpid()} stalled", file=file, flush=True)
                    faulthandler.dump_traceback(file, all_threads=True)
                return
        faulthandler.dump_traceback(_STDERR, all_threads=True)

    def _end_after(self, first: dict[str, Any], failures: Store) -> NoReturn:
        """End this rank because another one failed."""
        try:
            print(f"\n{name_first_cause(first, self._world.rank)}", file=sys.stderr, flush=True)
            leave_store(failures, self._world)
        finally:
            os._exit(1)

    def _end_if_orphaned(self, failures: Store | None) -> None:
        """End this rank when its launcher's process has died: the next start would find it at work in the same run."""
        launcher = self._world.launcher
        if launcher is None or not launcher.is_gone:
            return
        try:
            cause = describe_failure(
                self._world.rank,
                f"{launcher.name} (process {launcher.process}) has died on {self._beat.host}, and its ranks end "
                "with it; the same command continues from the newest checkpoint",
            )
            print(f"\n{name_failure(cause)}", file=sys.stderr, flush=True)
            alone = os.environ.get("LOCAL_WORLD_SIZE") == str(self._world.size)  # all ranks see it; the store is gone
            if failures is not None and not alone:
                self._ask(lambda: claim_first_cause(cause, failures))
                leave_store(failures, self._world)
        finally:
            os._exit(1)

    def _read(self, store: Store) -> dict[int, Beat]:
        names = {rank: f"beat/{rank}" for rank in range(self._world.size)}
        beats = {rank: json.loads(store.get(name)) for rank, name in names.items() if store.check([name])}
        return {rank: Beat(**fields | {"keys": tuple(fields["keys"])}) for rank, fields in beats.items()}


def _end_here(silent: Sequence[Beat], text: str) -> None:
    """End the silent ranks of this host, which can do nothing themselves any more; those of others, ranks over there.

    SIGALRM lets one whose C code holds the interpreter write its stacks; SIGKILL ends stopped processes, too. Either
    way torchrun may see it end before this rank, and closes with what it finds then: `text`, left in its place.
    """
    here = [beat for beat in silent if beat.host == socket.gethostname() and _environment(beat)]
    for beat in here:
        leave_for_torchrun(text, time.time(), _environment(beat))
        _signal(beat, signal.SIGALRM)
    if here:
        time.sleep(_STACKS_S)
    for beat in here:
        _signal(beat, signal.SIGKILL)


def _environment(beat: Beat) -> dict[str, str]:
    """The variables a rank was started with; none of another process with its number, or of one that is gone."""
    found: dict[str, str] = {}
    with suppress(OSError):  # it is gone, or not ours
        for entry in Path(f"/proc/{beat.pid}/environ").read_bytes().split(b"\0"):
            name, _, value = os.fsdecode(entry).partition("=")
            found[name] = value
    # another container may share this host's name and use the number for something else
    return found if found.get("RANK") == str(beat.rank) else {}


def _signal(beat: Beat, number: signal.Signals) -> None:
    if _environment(beat):
        with suppress(OSError):
            os.kill(beat.pid, number)


def find_stalled(beats: dict[int, Beat], silent: set[int]) -> list[int]:
    """The ranks that hold up the others: those that send nothing, else those with the fewest notes.

    Among several with equally few, those whose main thread is not inside a collective, if there are any.
    """
    if silent:
        return sorted(silent)
    fewest = min(beat.notes for beat in beats.values())
    last = [rank for rank, beat in beats.items() if beat.notes == fewest]
    return [rank for rank in last if not beats[rank].in_collective] or last


def describe_stall(beats: dict[int, Beat], silent: set[int], limit: str) -> str:
    """The report of `limit` being over: every rank in a line, then the stalled ones with keys and stack."""
    stalled = find_stalled(beats, silent)
    lines = [f"\nSTALLED: no progress within {limit}. Every rank's last note:"]
    for rank, beat in sorted(beats.items()):
        mark = "sends nothing any more" if rank in silent else f"for {beat.still_s:.0f} s"
        lines.append(f"  rank {rank} ({beat.host}, process {beat.pid}): {beat.activity}, {mark}")
    lines += [f"  rank {rank}: never sent anything" for rank in sorted(silent - set(beats))]
    for rank in stalled:
        if rank not in beats:
            continue
        beat = beats[rank]
        why = ": its process is stopped, gone, cut off, or holds the interpreter in C code" if rank in silent else ""
        lines.append(f"\nrank {rank} holds up the others{why}. It was at: {beat.activity}")
        lines.append(f"samples: {', '.join(beat.keys) or 'none noted'}")
        lines.append(f"Python stack (most recent call last):\n{beat.stack}" if beat.stack else "no stack was sent")
    return "\n".join(lines)
