"""What a clip is, told from its packets: size, turns, number and times of its frames.

Enters: the bytes or an open file of a clip. Leaves: `ClipFacts`, and which frames stand nearest to given times. Costs
0.01 ms a frame (packets are listed, not decoded) and the decoding of one frame, for rotation and as a proof.

Headers lie about durations, rates vary, streams start late: so frames are counted and timed here, once for all
decoders, which are then asked for frame numbers.

Only containers recognised by their first bytes are opened: FFmpeg would follow playlists to other files and hosts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image


class ClipError(Exception):
    """A clip that cannot be read; `reason` is the ledger's slug."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ClipFacts:
    """What the packets and the first frame say. `times` are seconds from the first frame, sorted, one per frame.

    `width` and `height` are pixels as displayed; `turns` the quarter turns (counter-clockwise) that display asks for;
    `duration_s` includes the last frame's own time on screen; `bits` is the depth of a colour. `packets` and their
    `stamps` are in decoding order, for PyAV's reader. `container` is to be closed.
    """

    width: int
    height: int
    turns: int
    times: NDArray[np.float64]
    duration_s: float
    fps: float
    codec: str
    bits: int
    stamps: tuple[int, ...]
    packets: tuple[Any, ...]
    stream: Any
    container: Any


def is_clip(head: bytes) -> bool:
    """Whether `head` (the first 200 bytes) begins one of the containers read here; playlists and scripts never do."""
    return (
        head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"moof", b"styp")
        or head[:4] in (b"\x1aE\xdf\xa3", b"OggS", b"FLV\x01", b"DKIF", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")
        or (head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"))
        or head[:6] in (b"GIF87a", b"GIF89a")
        or head[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"
        or (head[:1] == b"\x47" and head[188:189] == b"\x47")
    )


def open_clip(source: str | io.BytesIO) -> ClipFacts:
    """List the packets of the best video stream and decode its first frame.

    Raises:
        ClipError: "not_a_clip" (no container, no video stream), "corrupt_clip" (no frame decodes).
    """
    if _begins_webp(source):
        return _open_webp(source)
    try:
        container = av.open(source, options={"enable_drefs": "0"})
        stream = container.streams.best("video")
    except (OSError, ValueError, IndexError) as error:
        raise ClipError("not_a_clip", f"no clip can be opened ({error})") from error
    if stream is None:
        raise ClipError("not_a_clip", "no video stream")
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    packets, ended = _list_packets(container, stream)
    if not packets:
        raise ClipError("corrupt_clip", f"a video stream without frames{ended}")
    if stream.frames and len(packets) < 0.95 * stream.frames:
        raise ClipError("corrupt_clip", f"{len(packets)} of the {stream.frames} frames in the header are there{ended}")
    stamps = _stamps(packets)
    first = _first_frame(stream, packets)
    unit = float(stream.time_base)
    times = (np.array(sorted(stamps), dtype=np.float64) - min(stamps)) * unit
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    gap = _last_gap(packets, stamps, times, unit, rate)
    turns = round(first.rotation / 90) % 4
    height, width = (first.height, first.width) if turns % 2 == 0 else (first.width, first.height)
    duration = float(times[-1]) + gap
    return ClipFacts(
        width=width,
        height=height,
        turns=turns,
        times=times,
        duration_s=duration,
        fps=len(times) / duration,
        codec=stream.codec_context.codec.name,
        bits=max(component.bits for component in first.format.components),
        stamps=tuple(stamps),
        packets=tuple(packets),
        stream=stream,
        container=container,
    )


def sample_frame_times(duration_s: float, num_frames: int) -> NDArray[np.float64]:
    """`num_frames` times in seconds, evenly from 0 to `duration_s`, both ends included: float64 [num_frames].

    `duration_s` is the time of the last frame after the first. At a constant rate the frames nearest to these times are
    those of Qwen's reference code, round(linspace(0, total - 1, num_frames)).
    """
    return np.linspace(0.0, duration_s, num_frames)


def nearest_frames(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each wanted time the number of the frame nearest to it (the earlier of two at the same distance).

    `times` [F] sorted, `wanted` [N] sorted, both in seconds → int64 [N].
    """
    right = np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1))
    if len(times) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    # A microsecond of slack: stamps in milliseconds must not turn a tie into the later frame.
    later = times[right] - wanted < wanted - times[right - 1] - 1e-6
    return np.where(later, right, right - 1).astype(np.int64)


def _list_packets(container: Any, stream: Any) -> tuple[list[Any], str]:
    """All packets with data in decoding order, and what ended the list early ("" at the regular end)."""
    packets = []
    try:
        for packet in container.demux(stream):
            if packet.size:
                packets.append(packet)
    except (OSError, ValueError) as error:
        return packets, f"; reading ends with: {error}"
    return packets, ""


def _stamps(packets: Sequence[Any]) -> list[int]:
    """Presentation stamps in decoding order; where the container has none, its decoding stamps, else the numbers."""
    stamps = [packet.pts if packet.pts is not None else packet.dts for packet in packets]
    if any(stamp is None for stamp in stamps):
        stamps = list(range(len(packets)))
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = number  # so that the frames carry it
    return stamps


def _first_frame(stream: Any, packets: Sequence[Any]) -> Any:
    """The first frame that decodes, for size and rotation; leaves the decoder flushed."""
    codec = stream.codec_context
    try:
        for packet in packets:
            for frame in codec.decode(packet):
                codec.flush_buffers()
                return frame
        for frame in codec.decode(None):
            codec.flush_buffers()
            return frame
    except (OSError, ValueError, EOFError) as error:
        raise ClipError("corrupt_clip", f"the first frame does not decode ({error})") from error
    raise ClipError("corrupt_clip", f"none of {len(packets)} packets gives a frame")


def _last_gap(
    packets: Sequence[Any], stamps: Sequence[int], times: NDArray[np.float64], unit: float, rate: float
) -> float:
    """Seconds the last frame stays: its packet's duration, else the mean gap, else the header's rate, else 40 ms."""
    last = packets[stamps.index(max(stamps))]
    if last.duration:
        return float(last.duration) * unit
    if len(times) > 1 and times[-1] > 0:
        return float(times[-1]) / (len(times) - 1)
    return 1 / rate if rate > 0 else 0.04


def _begins_webp(source: str | io.BytesIO) -> bool:
    if isinstance(source, str):
        with open(source, "rb") as file:
            return file.read(12)[8:] == b"WEBP"
    return source.getvalue()[8:12] == b"WEBP"


def _open_webp(source: str | io.BytesIO) -> ClipFacts:
    """Facts of an animated WebP, by Pillow; its frames carry their durations in milliseconds."""
    try:
        image = Image.open(source, formats=("WEBP",))
        starts, now_ms = [], 0
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            starts.append(now_ms)
            now_ms += int(image.info.get("duration") or 40)
    except Exception as error:  # Pillow raises nearly every type on damaged data
        raise ClipError("corrupt_clip", f"the animation does not decode ({error})") from error
    return ClipFacts(
        width=image.width,
        height=image.height,
        turns=0,
        times=np.array(starts, dtype=np.float64) / 1000,
        duration_s=now_ms / 1000,
        fps=len(starts) * 1000 / now_ms,
        codec="webp",
        bits=8,
        stamps=tuple(range(len(starts))),
        packets=(),
        stream=None,
        container=image,
    )
