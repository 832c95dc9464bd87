"""Clip bytes → facts, and resized frames under a deadline.

Enters: the bytes of one stored clip. Leaves: `Media` facts (`probe_video`), or uint8 [N, 3, h, w] frames as planned
(`ClipDecoder.read`). Which frames is decided in `clip_facts`, by which decoder in `video_backends`; both run in a
process of their own (`video_process`), because decoders hang and crash in C: a clip that exceeds its deadline costs
that process and is reported like any damaged clip. The process is also replaced after `max_reads` clips: decord keeps
memory of each.

Cost: starting the process 0.3 s, once per worker and 200 clips; handing over a clip and its frames about 1 ms, by
shared memory; decoding: see `benchmarks/decode.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.clip_cache import ClipCache
from data_pipelines.decode.clip_facts import ClipError, is_clip, open_clip, sample_frame_times
from data_pipelines.errors import MediaError, UserError
from data_pipelines.samples import Media, MediaPlan

__all__ = ["ClipDecoder", "probe_video", "read_clip", "sample_frame_times"]

BACKENDS = ("auto", "decord", "pyav", "torchcodec")
_START_TIMEOUT_S = 60.0
_MOST_WAITS = 10
_IDLE_S = 0.05


def probe_video(data: bytes, name: str, key: str) -> Media:
    """Facts of the clip `data` (member `name` of sample `key`): size as displayed, frames, rate and duration.

    Frames are counted and timed by listing the packets, since headers lie or are silent; the first frame is decoded,
    for rotation and as a proof. No deadline applies: for untrusted files use `ClipDecoder.probe`.

    Raises:
        MediaError: "empty_media", "not_a_clip" (no known container, no video), "corrupt_clip".
    """
    if not data:
        raise MediaError(key, "empty_media", f"clip {name!r} has 0 bytes")
    if not is_clip(data[:200]):
        raise MediaError(key, "not_a_clip", f"{name!r}: no known container in bytes that begin {data[:16]!r}")
    try:
        facts = open_clip(io.BytesIO(data))
    except ClipError as error:
        raise MediaError(key, error.reason, f"{name!r}: {error}") from error
    facts.container.close()
    return Media(name, "video", facts.width, facts.height, len(facts.times), facts.fps, facts.duration_s)


def read_clip(
    data: bytes, media: Media, plan: MediaPlan, key: str, backend: str = "auto", timeout_s: float = 60.0
) -> Tensor:
    """One clip through a decoder process of its own (0.3 s to start); many clips want a `ClipDecoder`."""
    with contextlib.closing(ClipDecoder(backend, timeout_s)) as decoder:
        return decoder.read(data, media, plan, key)


class ClipDecoder:
    """Reads clips in a helper process, with a deadline of `timeout_s` CPU seconds each. For one thread at a time.

    The process starts with the first clip, is replaced after `max_reads` clips, after a crash or a missed deadline, and
    ends with `close` or with this process, however that ends. It is not inherited: a forked or unpickled copy starts
    its own. A clip that `cache` holds as planned is read from there.
    """

    def __init__(
        self,
        backend: str = "auto",
        timeout_s: float = 60.0,
        max_reads: int = 200,
        cache: ClipCache | None = None,
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        if backend not in BACKENDS:
            raise UserError(f"video_backend {backend!r}: must be one of {', '.join(BACKENDS)}")
        self.backend = backend
        self.timeout_s = timeout_s
        self.max_reads = max_reads
        self.cache = cache
        self._owner = 0
        self._reads = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_connection": None, "_owner": 0, "_reads": 0}

    def __del__(self) -> None:
        self.close()

    def read(self, data: bytes, media: Media, plan: MediaPlan, key: str) -> Tensor:
        """Frames of the clip as planned: uint8 [plan.num_frames, 3, plan.height, plan.width], evenly over its time.

        The tensor is a view of memory whose layout is [N, h, w, 3].

        Raises:
            MediaError: "empty_media", "not_a_clip", "corrupt_clip", "size_mismatch" (the clip is not what `media`
                says), "decode_timeout", "decoder_crashed", "no_backend".
        """
        shape = (plan.num_frames, plan.height, plan.width, 3)
        name = self.cache.name(data, media, plan, self.backend) if self.cache is not None else ""
        if self.cache is not None and (held := self.cache.get(name, shape)) is not None:
            return torch.from_numpy(held).permute(0, 3, 1, 2)
        request = {
            "backend": self.backend,
            "num_frames": shape[0],
            "height": shape[1],
            "width": shape[2],
            "media_height": media.height,
            "media_width": media.width,
        }
        with _buffer(int(np.prod(shape))) as frames_fd:
            self._ask(data, request, frames_fd, media.name, key)
            frames = np.frombuffer(mmap.mmap(frames_fd, 0), dtype=np.uint8).reshape(shape)
        if self.cache is not None:
            self.cache.put(name, frames)
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def probe(self, data: bytes, name: str, key: str) -> Media:
        """As `probe_video`, with the deadline. Raises MediaError."""
        with _buffer(1) as nothing:
            facts = self._ask(data, {"num_frames": 0}, nothing, name, key)
        return Media(name, "video", facts["width"], facts["height"], facts["frames"], facts["fps"], facts["duration_s"])

    def close(self) -> None:
        """End the helper process now, whatever it does."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()

    def _ask(self, data: bytes, request: dict[str, Any], frames_fd: int, name: str, key: str) -> dict[str, Any]:
        """One request to the helper, which is started or replaced as needed."""
        if not data:
            raise MediaError(key, "empty_media", f"clip {name!r} has 0 bytes")
        with _buffer(len(data)) as source_fd:
            with open(source_fd, "wb", closefd=False) as file:
                file.write(data)
            connection = self._connect()
            line = json.dumps(request).encode() + b"\n"
            try:
                socket.send_fds(connection, [line], [source_fd, frames_fd])
                answer = _receive_line(connection, self.timeout_s, self._pid())
            except TimeoutError as error:
                self.close()
                raise MediaError(
                    key, "decode_timeout", f"{name!r} is not decoded after decode_timeout_s={self.timeout_s}"
                ) from error
            except (OSError, EOFError) as error:
                self.close()
                raise MediaError(key, "decoder_crashed", f"{name!r}: the decoder process died on it") from error
            except BaseException:  # an interrupt: the answer to this request must not meet the next
                self.close()
                raise
        if "reason" in answer:
            raise MediaError(key, answer["reason"], f"{name!r}: {answer['message']}")
        return answer

    def _connect(self) -> socket.socket:
        """The socket of a living helper of this very process."""
        usable = self._process is not None and self._owner == os.getpid() and self._process.poll() is None
        if not usable or self._reads >= self.max_reads or self._connection is None:
            self.close()
            self._start()
        self._reads += 1
        assert self._connection is not None
        return self._connection

    def _pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "data_pipelines.decode.video_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._connection, self._owner, self._reads = ours, os.getpid(), 0
        try:
            _receive_line(ours, _START_TIMEOUT_S, self._pid())
        except (OSError, EOFError) as error:
            self.close()
            raise RuntimeError("the clip decoder process does not start; its error is printed above") from error


def _receive_line(connection: socket.socket, timeout_s: float, pid: int) -> dict[str, Any]:
    """One JSON line from process `pid`. TimeoutError when it does not come in time, EOFError when the process is gone.

    The time allowed is `timeout_s` of the process's own CPU time: on a crowded machine a sound clip must not be lost to
    its neighbours. It is also ended after `timeout_s` in which it did nothing at all, and after ten times that anyhow.
    """
    connection.settimeout(timeout_s)
    line, started, seen = b"", _cpu_seconds(pid), _cpu_seconds(pid)
    for _ in range(_MOST_WAITS):
        try:
            while not line.endswith(b"\n"):
                data = connection.recv(65536)
                if not data:
                    raise EOFError("the decoder process closed its socket")
                line += data
            answer: dict[str, Any] = json.loads(line)
            return answer
        except TimeoutError:
            used = _cpu_seconds(pid)
            idle = used - seen < _IDLE_S and not _wants_to_run(pid)
            if idle or used - started >= timeout_s:
                raise
            seen = used
    raise TimeoutError


def _cpu_seconds(pid: int) -> float:
    """User and system time of process `pid`; 0 where the system does not tell (deadlines then are by the clock)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wants_to_run(pid: int) -> bool:
    """Whether a thread of process `pid` is running, waiting for a processor, or for a disk."""
    for task in Path("/proc").glob(f"{pid}/task/*/stat"):
        with contextlib.suppress(OSError):
            if task.read_text().rsplit(")", 1)[1].split()[0] in "RD":
                return True
    return False


@contextlib.contextmanager
def _buffer(size: int) -> Iterator[int]:
    """The descriptor of `size` bytes of memory that another process can map; a temporary file off Linux."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("clip", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)
