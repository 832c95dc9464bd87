"""Processes of our own for work on many cores, which never import the caller's `__main__`.

Enters: a function of a module, its tasks, and what stands for a task whose process died. Leaves: (task, result) as they
are finished. Costs an interpreter and the function's imports a process, about 3 s where these hold torch.

multiprocessing's "spawn" and "forkserver" import the caller's script again in each child: a script without
`if __name__ == "__main__"` fails or hangs there. "fork" copies the locks of torch's and CUDA's threads in any state.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_PR_SET_PDEATHSIG = 1
_READY = "ready"
# "-P": no file of the caller's folder may stand in for a module of Python's own before the path is the caller's.
_FLAGS = ("-P", "-c")
_START = (
    "import sys; from multiprocessing.connection import Connection; pipe = Connection(int(sys.argv[1])); "
    "sys.path[:] = pipe.recv(); from data_pipelines.processes import serve; serve(pipe, int(sys.argv[2]))"
)


@dataclass(slots=True)
class _Worker(Generic[T]):
    process: subprocess.Popen[bytes]
    pipe: Connection
    ready: bool = False
    tasks: list[T] = field(default_factory=list)  # the one it is at, or none

    def end(self) -> int:
        """Kill it, and return how it ended."""
        self.process.kill()
        self.pipe.close()
        return self.process.wait()


def end_of(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    return f"was ended by signal {-code}: out of memory?" if code < 0 else f"ended with {code}"


def _raise_lost(task: object, code: int) -> NoReturn:
    raise RuntimeError(f"a worker process {end_of(code)}")


def map_in_processes(
    function: Callable[[T], R],
    tasks: Sequence[T],
    processes: int,
    lost: Callable[[T, int], R] = _raise_lost,
) -> Generator[tuple[T, R], None, None]:
    """`function` of each task, in the order in which they are finished; close the generator to end the processes.

    `lost(task, exit code)` gives the result of a task that ended its process, and the others go on in a new one; left
    out, it is an error. Function, tasks and results are pickled; the function lies in a module, not in a script.

    Raises:
        RuntimeError: a process does not start, or ended. What `function` raises, with its traceback as the cause.
    """
    waiting = deque(tasks)
    workers: list[_Worker[T]] = []
    try:
        while waiting or any(worker.tasks for worker in workers):
            while waiting and len(workers) < processes:
                workers.append(_start(function))
            for worker in workers:
                if waiting and not worker.tasks:
                    worker.tasks.append(waiting.popleft())
                    _send(worker.pipe, worker.tasks[0])
            for pipe in wait([worker.pipe for worker in workers if worker.tasks]):
                worker = next(worker for worker in workers if worker.pipe is pipe)
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    code = worker.process.wait()
                    worker.end()
                    if not worker.ready:
                        raise RuntimeError(f"a worker process does not start (exit {code}): see above") from None
                    yield worker.tasks[0], lost(worker.tasks[0], code)
                    continue
                if answer == _READY:
                    worker.ready = True
                    continue
                result, error, trace = answer
                if error is not None:
                    raise error from RuntimeError(f"in a worker process:\n{trace}")
                yield worker.tasks.pop(), result
    finally:
        for worker in workers:
            worker.end()


def serve(pipe: Connection, parent: int) -> None:
    """A worker's life: tasks in, results out, until the parent closes the pipe or dies; Ctrl-C is the parent's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    function = pipe.recv()
    pipe.send(_READY)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, Exception | None, str] = (function(task), None, "")
        except Exception as error:
            answer = (None, _portable(error), traceback.format_exc()[-8000:])
        pipe.send(answer)


def _start(function: Callable[[T], R]) -> _Worker[T]:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *_FLAGS, _START, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,  # the caller's may be its script
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            process_group=0,  # out of reach of a terminal's Ctrl-C, also while it starts
        )
    _send(ours, sys.path)
    _send(ours, function)
    return _Worker(process, ours)


def _send(pipe: Connection, value: object) -> None:
    try:
        pipe.send(value)
    except OSError:  # it died: the next look at the pipe tells
        return


def _portable(error: Exception) -> Exception:
    """The error, or its words where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
