"""The decoder process: reads clips for one parent, which can end it at any moment.

Decoders of hostile or damaged clips hang and crash inside C, where no exception and no thread can stop them. So they
run here, in a process of their own; the parent (`video.ClipDecoder`) waits with a deadline and kills what exceeds it.

Enters, over a Unix socket: one JSON line per request with two file descriptors, the clip's bytes and a buffer for the
frames. Leaves: one JSON line; the frames lie in the buffer, so pixels are never sent through a pipe. It ends when the
socket closes or the parent dies. It imports neither torch nor transformers and starts in about 0.2 s.
"""

from __future__ import annotations

import ctypes
import io
import json
import mmap
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.decode.clip_facts import (
    ClipError,
    ClipFacts,
    is_clip,
    nearest_frames,
    open_clip,
    sample_frame_times,
)
from data_pipelines.decode.video_backends import read_frames

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests on the socket whose descriptor is the first argument, until it closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    _isolate()
    _send(connection, {"ready": True})
    while True:
        line, descriptors = _receive(connection)
        if not line:
            return
        try:
            answer = answer_request(json.loads(line), *descriptors)
        except ClipError as error:
            answer = {"reason": error.reason, "message": str(error)}
        except MemoryError as error:
            answer = {"reason": "corrupt_clip", "message": f"out of memory while decoding ({error})"}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        _send(connection, answer)


def answer_request(request: dict[str, Any], source_fd: int, frames_fd: int) -> dict[str, Any]:
    """Facts of the clip in `source_fd`; and, if `num_frames` is asked for, its frames in `frames_fd`.

    Request: `backend`, `num_frames` (0: facts alone), `height`, `width` of a frame, `media_height`, `media_width` as
    planned. Frames: uint8 [num_frames, height, width, 3].
    """
    if not is_clip(os.pread(source_fd, 200, 0)):
        raise ClipError("not_a_clip", f"no known container in bytes that begin {os.pread(source_fd, 16, 0)!r}")
    source = _source(source_fd)
    facts = open_clip(source)
    try:
        answer: dict[str, Any] = {
            "width": facts.width,
            "height": facts.height,
            "frames": len(facts.times),
            "fps": facts.fps,
            "duration_s": facts.duration_s,
        }
        if request["num_frames"]:
            answer["decoder"] = _read_into(source, facts, request, frames_fd)
        return answer
    finally:
        facts.container.close()


def _read_into(source: str | io.BytesIO, facts: ClipFacts, request: dict[str, Any], frames_fd: int) -> str:
    """Decode the requested frames into `frames_fd`; returns the decoder's name."""
    if (facts.width, facts.height) != (request["media_width"], request["media_height"]):
        raise ClipError(
            "size_mismatch",
            f"the clip shows {facts.width} x {facts.height} pixels, the index or record says "
            f"{request['media_width']} x {request['media_height']}; rebuild the index, or correct the record",
        )
    shape = (request["num_frames"], request["height"], request["width"], 3)
    numbers = nearest_frames(facts.times, sample_frame_times(float(facts.times[-1]), shape[0]))
    frames, decoder = read_frames(source, facts, numbers.tolist(), shape[1], shape[2], request["backend"])
    if frames.shape != shape:
        raise ClipError("corrupt_clip", f"{decoder} gave frames {frames.shape}, asked for {shape}")
    with mmap.mmap(frames_fd, 0) as buffer:
        # A temporary array, or the buffer could not be closed.
        np.frombuffer(buffer, dtype=np.uint8).reshape(shape)[...] = frames
    return decoder


def _source(descriptor: int) -> str | io.BytesIO:
    """A path to the bytes where the system has one (decoders then read in C), else a copy in memory."""
    path = f"/proc/self/fd/{descriptor}"
    if os.path.exists(path):
        return path
    with open(descriptor, "rb", closefd=False) as file:
        return io.BytesIO(file.read())


def _isolate() -> None:
    """No output, no core files, deaf to Ctrl-C (the parent decides), and gone when the parent is."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # decoders print to them from C
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if not Path(f"/proc/{os.getppid()}").exists() or os.getppid() == 1:
            sys.exit(0)  # the parent died before the line above


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One request line and its two descriptors; an empty line when the parent has closed the socket."""
    line, descriptors = b"", list[int]()
    while not line.endswith(b"\n"):
        data, received, _, _ = socket.recv_fds(connection, 65536, 2)
        if not data:
            return b"", []
        line += data
        descriptors += received
    return line, descriptors


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
