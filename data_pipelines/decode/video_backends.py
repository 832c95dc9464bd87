"""Three decoders for clips behind one question: give me these frames, at this size.

Enters: an open file (or its bytes) of a clip. Leaves: `ClipFacts` from its packets, or RGB frames uint8 [N, h, w, 3],
resized by the decoder. This module runs in the decoder process (`video_process`), so it imports neither torch nor
anything that does.

Which frames is decided once for all decoders, from the time stamps of the packets, which PyAV lists without decoding
(0.01 ms a frame): headers lie about durations, rates vary, streams start late. The decoders are then asked for frame
numbers, in order of presentation:
- decord: the default; lacks AV1 and GIF, rounds 10-bit colours badly, refuses damaged files, and can hang.
- PyAV: its own current FFmpeg, takes everything; decodes only what the frames asked for depend on.
- torchcodec: where the user has installed it.
"auto" asks decord and, whatever goes wrong there, PyAV.

Only containers recognised by their first bytes are opened: FFmpeg would follow playlists to other files and hosts.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
_DECORD_LACKS = frozenset({"av1", "libdav1d", "libaom-av1", "gif", "webp", "vvc", "apng"})


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
    `stamps` are in decoding order, for PyAV's reader.
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


def read_frames(
    source: str | io.BytesIO, facts: ClipFacts, numbers: Sequence[int], height: int, width: int, backend: str
) -> tuple[Frames, str]:
    """Frames `numbers` (ascending, repeats allowed) as uint8 [N, height, width, 3], and the decoder that gave them.

    Raises:
        ClipError: "corrupt_clip" when no decoder gets all of them; "no_backend" when the one asked for is missing.
    """
    if backend == "pyav":
        return read_pyav(facts, numbers, height, width), "pyav"
    if backend == "torchcodec":
        return _guarded(read_torchcodec, source, facts, numbers, height, width), "torchcodec"
    if backend == "decord":
        return _guarded(read_decord, source, facts, numbers, height, width), "decord"
    if facts.codec not in _DECORD_LACKS and facts.bits == 8:
        try:
            return _guarded(read_decord, source, facts, numbers, height, width), "decord"
        except ClipError:  # codecs, damaged indexes, odd sizes: PyAV has the last word
            return read_pyav(facts, numbers, height, width), "pyav"
    return read_pyav(facts, numbers, height, width), "pyav"


def read_decord(source: str | io.BytesIO, facts: ClipFacts, numbers: Sequence[int], height: int, width: int) -> Frames:
    """As `read_frames`, by decord (which applies rotation itself, before resizing)."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise _missing("decord", error) from error

    reader = decord.VideoReader(source, width=width, height=height, num_threads=1)
    if len(reader) != len(facts.times):
        raise ClipError("corrupt_clip", f"decord sees {len(reader)} frames, the packets are {len(facts.times)}")
    # In some AVI files decord finds no stamps, takes them as -3e17 s, and then returns other frames than asked for.
    stamps = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    if not np.allclose(stamps - stamps[0], facts.times, atol=0.002 + 1e-6 * facts.duration_s):
        raise ClipError("corrupt_clip", "decord's time stamps are not those of the packets")
    frames: Frames = reader.get_batch(list(numbers)).asnumpy()
    return frames


def read_torchcodec(
    source: str | io.BytesIO, facts: ClipFacts, numbers: Sequence[int], height: int, width: int
) -> Frames:
    """As `read_frames`, by torchcodec (which applies rotation); resized with torch's antialiased bilinear filter."""
    from torch.nn import functional

    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # absent, or its FFmpeg libraries are
        raise _missing("torchcodec", error) from error

    decoder = VideoDecoder(source, num_ffmpeg_threads=1, seek_mode="exact")
    if decoder.metadata.num_frames != len(facts.times):
        raise ClipError("corrupt_clip", f"torchcodec sees {decoder.metadata.num_frames} frames of {len(facts.times)}")
    out = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    for i, number in enumerate(numbers):
        frame = decoder.get_frame_at(int(number)).data
        resized = functional.interpolate(frame[None], size=(height, width), mode="bilinear", antialias=True)
        out[i] = resized[0].permute(1, 2, 0).numpy()
    return out


def read_pyav(facts: ClipFacts, numbers: Sequence[int], height: int, width: int) -> Frames:
    """As `read_frames`, by PyAV: decodes from the key frame before each frame asked for, and skips frames that neither
    are asked for nor serve as a reference.

    A frame the decoder leaves out without an error (hidden reference frames) is replaced by the one shown before it.

    Raises:
        ClipError: "corrupt_clip" when decoding fails, or less than half of the frames appear.
    """
    shown = sorted(facts.stamps)
    targets = sorted({shown[number] for number in numbers})
    frame_height, frame_width = (height, width) if facts.turns % 2 == 0 else (width, height)
    found: dict[int, Frames] = {}

    def keep(frame: Any) -> None:
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp in wanted and stamp not in found:
            # decord's filter is bilinear too: whichever reads a clip, its pixels agree within 0.2 levels in the mean.
            resized = frame.reformat(frame_width, frame_height, format="rgb24", interpolation="BILINEAR")
            found[stamp] = np.rot90(resized.to_ndarray(), facts.turns)

    wanted = frozenset(targets)
    codec = facts.stream.codec_context
    try:
        for start, stop in _segments(facts, wanted):
            codec.flush_buffers()
            for number in range(start, stop):
                codec.skip_frame = "DEFAULT" if facts.stamps[number] in wanted else "NONREF"
                for frame in codec.decode(facts.packets[number]):
                    keep(frame)
            for frame in codec.decode(None):
                keep(frame)
    except (OSError, ValueError, EOFError) as error:
        raise ClipError("corrupt_clip", f"decoding fails after {len(found)} frames ({error})") from error
    if 2 * len(found) < len(targets):
        raise ClipError("corrupt_clip", f"{len(found)} of {len(targets)} frames decode")
    have = np.array(sorted(found))
    out = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    for i, number in enumerate(numbers):
        place = max(0, int(np.searchsorted(have, shown[number], side="right")) - 1)
        out[i] = found[int(have[place])]
    return out


def _guarded(
    read: Callable[[str | io.BytesIO, ClipFacts, Sequence[int], int, int], Frames],
    source: str | io.BytesIO,
    facts: ClipFacts,
    numbers: Sequence[int],
    height: int,
    width: int,
) -> Frames:
    """Any failure of an optional decoder as a ClipError; their exception types are their own."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        return read(source, facts, numbers, height, width)
    except ClipError:
        raise
    except Exception as error:
        raise ClipError("corrupt_clip", f"{read.__name__} fails: {str(error)[:200]}") from error


def _missing(name: str, error: Exception) -> ClipError:
    return ClipError("no_backend", f"{name} cannot be imported ({str(error)[:100]}); install it or use another backend")


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


def _segments(facts: ClipFacts, wanted: frozenset[int]) -> list[tuple[int, int]]:
    """Ranges of packets to decode, each from a key frame to the last packet asked for; ranges that touch are joined.

    A frame shown before the key frame of its own range (open GOP) needs the range before as well.
    """
    keys = [number for number, packet in enumerate(facts.packets) if packet.is_keyframe]
    if not keys or keys[0] != 0:
        keys.insert(0, 0)
    ends = [*keys[1:], len(facts.packets)]
    needed: dict[int, int] = {}
    for group, (start, stop) in enumerate(zip(keys, ends, strict=True)):
        asked = [number for number in range(start, stop) if facts.stamps[number] in wanted]
        if asked:
            needed[group] = asked[-1] + 1
            if group and any(facts.stamps[number] < facts.stamps[start] for number in asked):
                needed[group - 1] = start
    segments: list[tuple[int, int]] = []
    for group in sorted(needed):
        if segments and segments[-1][1] == keys[group]:
            segments[-1] = (segments[-1][0], needed[group])
        else:
            segments.append((keys[group], needed[group]))
    return segments
