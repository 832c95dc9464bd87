"""Three decoders for clips behind one question: give me these frames, at this size.

Enters: an open clip (`clip_facts`) and frame numbers in order of presentation. Leaves: RGB frames uint8 [N, h, w, 3],
resized by the decoder. This module runs in the decoder process (`video_process`), so it imports neither torch nor
anything that does, unless torchcodec is asked for.

- decord: the default; lacks AV1 and GIF, rounds 10-bit colours badly, refuses damaged files, and can hang.
- PyAV: its own current FFmpeg, takes everything; decodes only what the frames asked for depend on.
- torchcodec: where the user has installed it.
"auto" asks decord and, whatever goes wrong there, PyAV. Animated WebP, which no FFmpeg here decodes, goes to Pillow.

All three filter bilinearly (decord knows nothing else): whichever reads a clip, frames differ by 0.2 levels in the mean
between decord and PyAV, 1 to 2 levels for torchcodec.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.decode.clip_facts import ClipError, ClipFacts

Frames = NDArray[np.uint8]
_DECORD_LACKS = frozenset({"av1", "libdav1d", "libaom-av1", "gif", "vvc", "apng"})


def read_frames(
    source: str | io.BytesIO, facts: ClipFacts, numbers: Sequence[int], height: int, width: int, backend: str
) -> tuple[Frames, str]:
    """Frames `numbers` (ascending, repeats allowed) as uint8 [N, height, width, 3], and the decoder that gave them.

    Raises:
        ClipError: "corrupt_clip" when no decoder gets all of them; "no_backend" when the one asked for is missing.
    """
    if facts.codec == "webp":
        return read_webp(facts, numbers, height, width), "pillow"
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


def read_webp(facts: ClipFacts, numbers: Sequence[int], height: int, width: int) -> Frames:
    """As `read_frames`, for an animated WebP, by Pillow; transparency lies on white."""
    out = np.empty((len(numbers), height, width, 3), dtype=np.uint8)
    white = Image.new("RGBA", (facts.width, facts.height), (255, 255, 255, 255))
    try:
        for i, number in enumerate(numbers):
            facts.container.seek(number)
            frame = Image.alpha_composite(white, facts.container.convert("RGBA")).convert("RGB")
            out[i] = np.asarray(frame.resize((width, height), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow raises nearly every type on damaged data
        raise ClipError("corrupt_clip", f"the animation does not decode ({error})") from error
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
