import contextlib
import gc
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import MediaConfig
from data_pipelines.decode import video_process
from data_pipelines.decode.clip_facts import ClipError, is_clip, nearest_frames, open_clip
from data_pipelines.decode.video import ClipDecoder, probe_video, read_clip, sample_frame_times
from data_pipelines.decode.video_backends import read_decord, read_pyav
from data_pipelines.encode.budget import plan_media
from data_pipelines.errors import DataError, MediaError
from data_pipelines.samples import Media, MediaPlan, MediaRef

CONFIG = MediaConfig(video_min_pixels=4 * 784, video_max_pixels=16 * 784)


def clip(count=40, width=64, height=48, fps=10, codec="libx264", form="mp4", times_ms=None, gop=12, rotation=None):
    """A clip whose frame i is grey of level 5 * (i % 45) + 20; turned clips have their brightest quarter top left."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.bit_rate = 4_000_000
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if codec == "libx264":
            stream.options = {"crf": "10", "bf": "3"}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(count):
            pixels = np.full((height, width, 3), level(number), dtype=np.uint8)
            if rotation is not None:
                pixels[: height // 2, : width // 2] = 250
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def level(number):
    return 20 + 5 * (number % 45)


def levels(frames):
    """The number of each frame, read from its grey."""
    return [round((float(frame[..., 10:, 10:].float().mean()) - 20) / 5) for frame in frames]


def plan(media, **limits):
    return plan_media([(media, MediaRef(media.name, **limits))], 0, CONFIG, 16384, "key")[0]


@pytest.fixture(scope="module")
def plain():
    return clip()


@pytest.fixture(scope="module")
def decoder():
    decoder = ClipDecoder(timeout_s=30)
    yield decoder
    decoder.close()


def test_times_are_spread_evenly_with_both_ends():
    assert sample_frame_times(9.0, 4).tolist() == [0.0, 3.0, 6.0, 9.0]
    assert sample_frame_times(0.0, 2).tolist() == [0.0, 0.0]


def test_constant_rate_gives_the_frames_of_the_reference_code():
    for total in range(2, 120):
        for count in range(2, min(total, 30), 2):
            exact = np.linspace(0, total - 1, count)
            picked = nearest_frames(np.arange(total) / 25.0, sample_frame_times((total - 1) / 25.0, count))
            ties = np.isclose(exact % 1, 0.5)
            assert (picked == np.round(exact))[~ties].all()
            assert (picked == np.floor(exact))[ties].all()


def test_frames_are_picked_by_time_not_by_number():
    times = np.array([0.0, 0.1, 0.2, 0.3, 10.0])
    assert nearest_frames(times, np.array([0.0, 2.0, 6.0, 10.0])).tolist() == [0, 3, 4, 4]
    assert nearest_frames(np.array([0.0]), np.array([0.0, 0.0])).tolist() == [0, 0]


def test_facts_are_counted_from_packets(plain):
    media = probe_video(plain, "0.mp4", "key")
    assert (media.kind, media.width, media.height, media.frames) == ("video", 64, 48, 40)
    assert media.duration_s == pytest.approx(4.0, abs=0.01)
    assert media.fps == pytest.approx(10.0, abs=0.05)


def test_frames_come_as_planned(plain, decoder):
    media = probe_video(plain, "0.mp4", "key")
    item = plan(media)  # 4 s at 2 fps: 8 frames; 64 x 48 is nearest to 2 x 2 tokens
    assert (item.num_frames, item.grid_thw) == (8, (4, 4, 4))
    frames = decoder.read(plain, media, item, "key")
    assert tuple(frames.shape) == (8, 3, 56, 56)
    # linspace(0, 3.9, 8) seconds: 0, 0.56, 1.11, 1.67, 2.23, 2.79, 3.34, 3.9
    assert levels(frames) == [0, 6, 11, 17, 22, 28, 33, 39]


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_backends_agree(plain, backend):
    media = probe_video(plain, "0.mp4", "key")
    item = MediaPlan("video", (10, 4, 6), 20)
    expected = read_clip(plain, media, item, "key", backend="pyav").int()
    if backend == "torchcodec":
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"torchcodec: {str(error)[:80]}")
    frames = read_clip(plain, media, item, "key", backend=backend).int()
    assert levels(frames) == levels(expected)
    assert (frames - expected).abs().float().mean() < 2.0


def test_pyav_decodes_only_what_is_needed(plain):
    numbers = [1, 13, 14, 38]
    facts = open_clip(io.BytesIO(plain))
    frames = read_pyav(facts, numbers, 48, 64)
    with av.open(io.BytesIO(plain)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.abs(frames.astype(int) - np.stack([every[number] for number in numbers])).max() <= 1


@pytest.mark.parametrize("numbers", [[0, 0, 39], [39], [11, 12], list(range(40))])
def test_any_frames_can_be_asked_for(plain, numbers):
    facts = open_clip(io.BytesIO(plain))
    by_pyav = read_pyav(facts, numbers, 48, 64)
    by_decord = read_decord(io.BytesIO(plain), facts, numbers, 48, 64)
    assert [round((frame.mean() - 20) / 5) for frame in by_pyav] == numbers
    assert np.abs(by_pyav.astype(int) - by_decord).mean() < 1.0


def test_variable_rate_is_sampled_by_time(decoder):
    times = [0, 40, 80, 120, 160, 200, 240, 280, 320, 2000, 3000, 4000]
    data = clip(count=12, times_ms=times)
    media = probe_video(data, "0.mp4", "key")
    assert media.frames == 12
    assert media.duration_s == pytest.approx(4.3, abs=0.8)
    frames = decoder.read(data, media, MediaPlan("video", (2, 4, 6), 4), "key")
    assert levels(frames) == [0, 9, 10, 11]  # at 0, 1.33, 2.67 and 4 s


def test_a_late_start_is_subtracted(decoder):
    data = clip(count=20, form="matroska", times_ms=[90_000 + 100 * number for number in range(20)])
    media = probe_video(data, "0.mkv", "key")
    assert media.duration_s == pytest.approx(2.0, abs=0.05)
    assert levels(decoder.read(data, media, plan(media), "key")) == [0, 6, 13, 19]


def test_one_frame_is_shown_twice(decoder):
    data = clip(count=1)
    media = probe_video(data, "0.mp4", "key")
    assert levels(decoder.read(data, media, plan(media), "key")) == [0, 0]


@pytest.mark.parametrize(
    ("codec", "form"), [("mpeg4", "avi"), ("libvpx", "webm"), ("libvpx-vp9", "webm"), ("gif", "gif")]
)
def test_other_codecs_and_containers_are_read(decoder, codec, form):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    if codec == "gif":
        file = io.BytesIO()
        frames = [Image.new("L", (64, 48), level(number)) for number in range(30)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
        data = file.getvalue()
    else:
        data = clip(count=30, codec=codec, form=form)
    media = probe_video(data, f"0.{form}", "key")
    assert (media.frames, media.width, media.height) == (30, 64, 48)
    assert levels(decoder.read(data, media, MediaPlan("video", (2, 4, 6), 4), "key")) == [0, 10, 19, 29]


def test_animated_webp_is_a_clip_where_asked(decoder):
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 48), (level(number),) * 3) for number in range(20)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    media = probe_video(file.getvalue(), "0.webp", "key")
    assert (media.frames, media.width, media.height, media.duration_s) == (20, 64, 48, pytest.approx(2.0))
    shots = decoder.read(file.getvalue(), media, MediaPlan("video", (2, 4, 6), 4), "key")
    assert levels(shots) == [0, 6, 13, 19]
    with pytest.raises(MediaError, match="corrupt_clip"):
        decoder.read(file.getvalue()[:300], media, MediaPlan("video", (2, 4, 6), 4), "key")


@pytest.mark.parametrize(("rotation", "corner"), [(90, (1, 0)), (180, (1, 1)), (270, (0, 1))])
def test_rotation_metadata_is_applied(rotation, corner):
    try:
        data = clip(count=4, rotation=rotation)
    except AttributeError:
        pytest.skip("this PyAV cannot write rotation metadata")
    media = probe_video(data, "0.mp4", "key")
    assert (media.width, media.height) == ((48, 64) if rotation != 180 else (64, 48))
    item = plan(media)
    shots = [read_clip(data, media, item, "key", backend=backend) for backend in ("pyav", "decord")]
    for frames in shots:
        rows, columns = item.height // 2, item.width // 2
        quarters = frames[0, 0].unfold(0, rows, rows).unfold(1, columns, columns).float().mean((2, 3))
        assert divmod(int(quarters.argmax()), 2) == corner


def test_a_clip_other_than_indexed_is_an_error(plain, decoder):
    media = Media("0.mp4", "video", 320, 240, 40, 10.0, 4.0)
    with pytest.raises(MediaError, match=r"key: '0.mp4': the clip shows 64 x 48 pixels.*320 x 240.*\[size_mismatch\]"):
        decoder.read(plain, media, plan(media), "key")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_media"),
        (b"<html>404</html>", "not_a_clip"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not_a_clip"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not_a_clip"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 8, "not_a_clip"),
    ],
)
def test_other_content_is_no_clip(decoder, data, reason):
    media = Media("0.mp4", "video", 64, 48, 40, 10.0, 4.0)
    for call in (
        lambda: probe_video(data, "0.mp4", "key"),
        lambda: decoder.probe(data, "0.mp4", "key"),
        lambda: decoder.read(data, media, plan(media), "key"),
    ):
        with pytest.raises(MediaError, match=r"^key: ") as caught:
            call()
        assert caught.value.reason == reason


def test_a_clip_cut_short_is_an_error(decoder):
    data = clip(count=60, form="matroska", fps=25)
    media = probe_video(data, "0.mkv", "key")
    whole = clip(count=60, fps=25)
    cut = whole[: len(whole) // 2]
    for call in (lambda: decoder.read(cut, media, plan(media), "key"), lambda: probe_video(cut, "0.mp4", "key")):
        with pytest.raises(MediaError):
            call()


def test_damage_never_escapes_as_another_error(plain, decoder):
    media = probe_video(plain, "0.mp4", "key")
    rng = np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(plain)
        for _ in range(int(rng.integers(1, 40))):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            frames = decoder.read(bytes(data), media, plan(media), "key")
            assert frames.shape[0] == 8
        except MediaError:
            continue


def test_the_decoder_process_is_replaced_after_a_crash(plain):
    media = probe_video(plain, "0.mp4", "key")
    decoder = ClipDecoder(timeout_s=30)
    decoder.read(plain, media, plan(media), "key")
    first = decoder._process.pid
    os.kill(first, signal.SIGKILL)
    decoder._process.wait()
    assert levels(decoder.read(plain, media, plan(media), "key"))[0] == 0
    assert decoder._process.pid != first
    decoder.close()


def test_a_decoder_that_hangs_is_ended_in_time(plain):
    media = probe_video(plain, "0.mp4", "key")
    decoder = ClipDecoder(timeout_s=30)
    decoder.read(plain, media, plan(media), "key")
    process = decoder._process
    os.kill(process.pid, signal.SIGSTOP)  # as deaf as a hang in C: no signal handler, no thread answers
    decoder.timeout_s = 0.3
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"not decoded after decode_timeout_s=0.3 \[decode_timeout\]"):
        decoder.read(plain, media, plan(media), "key")
    assert time.monotonic() - start < 5
    assert process.poll() is not None
    decoder.timeout_s = 30
    assert len(decoder.read(plain, media, plan(media), "key")) == 8
    decoder.close()


ENDLESS = """
while True:
    pass
"""
SLOW = """
for _ in range(10):
    end = time.process_time() + 0.03
    while time.process_time() < end:
        pass
    time.sleep(0.15)
c.sendall(b'{"width": 1, "height": 2, "frames": 3, "fps": 4.0, "duration_s": 5.0}\\n')
time.sleep(60)
"""


@pytest.fixture
def instead(monkeypatch):
    """Put a script in the place of the decoder process."""

    def put(script):
        start = (
            "import socket, sys, time\nc = socket.socket(fileno=int(sys.argv[-1]))\nc.sendall(b'{}\\n')\nc.recv(9999)\n"
        )
        real = subprocess.Popen
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **rest: real([command[0], "-c", start + script, command[-1]], **rest)
        )

    return put


def test_a_decoder_that_works_without_end_is_ended_too(plain, instead):
    instead(ENDLESS)
    with contextlib.closing(ClipDecoder(timeout_s=0.5)) as decoder:
        waited = time.process_time()
        with pytest.raises(MediaError, match="decode_timeout"):
            decoder.probe(plain, "0.mp4", "key")
        assert time.process_time() - waited < 0.5  # waiting costs nothing


def test_a_starved_decoder_gets_its_time(plain, instead):
    instead(SLOW)  # 1.8 s by the clock, 0.3 s of its own
    with contextlib.closing(ClipDecoder(timeout_s=1.0)) as decoder:
        assert decoder.probe(plain, "0.mp4", "key") == Media("0.mp4", "video", 1, 2, 3, 4.0, 5.0)


def test_an_interrupted_read_does_not_answer_the_next(plain):
    media = probe_video(plain, "0.mp4", "key")
    other = clip(count=4, width=96, height=32)
    with contextlib.closing(ClipDecoder(timeout_s=30)) as decoder:
        decoder.probe(plain, "0.mp4", "key")
        os.kill(decoder._process.pid, signal.SIGSTOP)
        previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(plain, media, plan(media), "key")
        signal.signal(signal.SIGALRM, previous)
        assert decoder.probe(other, "0.mp4", "key").width == 96


def test_a_crash_while_decoding_is_one_sample_lost(plain):
    media = probe_video(plain, "0.mp4", "key")
    decoder = ClipDecoder(timeout_s=30)
    decoder.read(plain, media, plan(media), "key")
    process = decoder._process
    os.kill(process.pid, signal.SIGSTOP)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGKILL)
        os._exit(0)
    with pytest.raises(MediaError, match="decoder_crashed"):
        decoder.read(plain, media, plan(media), "key")
    os.waitpid(pid, 0)
    assert len(decoder.read(plain, media, plan(media), "key")) == 8
    decoder.close()


def test_the_process_is_recycled_and_leaves_nothing_open(plain):
    media = probe_video(plain, "0.mp4", "key")
    decoder = ClipDecoder(timeout_s=30, max_reads=2)
    decoder.read(plain, media, plan(media), "key")
    before, pids = len(os.listdir("/proc/self/fd")), set()
    for _ in range(6):
        frames = decoder.read(plain, media, plan(media), "key")
        pids.add(decoder._process.pid)
    assert len(pids) in (3, 4)
    del frames
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
    decoder.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 1


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_decoder_process_ends_with_its_parent(plain):
    media = probe_video(plain, "0.mp4", "key")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        decoder = ClipDecoder(timeout_s=30)
        decoder.read(plain, media, plan(media), "key")
        os.write(writer, str(decoder._process.pid).encode())
        time.sleep(60)
        os._exit(0)
    helper = int(os.read(reader, 20))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    while is_running(helper) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(helper)


def test_a_forked_or_pickled_decoder_starts_its_own_process(plain):
    media = probe_video(plain, "0.mp4", "key")
    decoder = ClipDecoder(timeout_s=30)
    decoder.read(plain, media, plan(media), "key")
    mine = decoder._process.pid
    copy = pickle.loads(pickle.dumps(decoder))
    assert copy._process is None
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        decoder.read(plain, media, plan(media), "key")
        os.write(writer, str(decoder._process.pid).encode())
        decoder.close()
        os._exit(0)
    theirs = int(os.read(reader, 20))
    os.waitpid(pid, 0)
    assert theirs != mine
    assert len(decoder.read(plain, media, plan(media), "key")) == 8
    assert decoder._process.pid == mine
    decoder.close()


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="video_backend 'ffmpeg': must be one of auto, decord, pyav, torchcodec"):
        ClipDecoder("ffmpeg")


def test_a_missing_backend_is_named(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ClipError, match="decord cannot be imported") as caught:
        read_decord(io.BytesIO(plain), open_clip(io.BytesIO(plain)), [0], 48, 64)
    assert caught.value.reason == "no_backend"


def test_the_decoder_process_needs_neither_torch_nor_transformers():
    code = f"import sys, {video_process.__name__}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_containers_are_known_by_their_first_bytes(plain):
    assert is_clip(plain[:200])
    assert not is_clip(b"")
    assert not is_clip(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ClipError):
        open_clip(io.BytesIO(b"RIFF\x00\x00\x00\x00AVI nothing more"))


@pytest.mark.parametrize("folder", ["real/video", "bad/video"])
def test_real_and_bad_clips_end_as_they_should(shared_data, decoder, folder):
    expectations = {}
    for item in json.loads((shared_data / "bad" / "manifest.json").read_text())["items"]:
        expectations[os.path.basename(item["file"])] = item["expected"]
    read, skipped = 0, 0
    for path in sorted((shared_data / folder).iterdir()):
        data = path.read_bytes()
        try:
            media = probe_video(data, path.name, path.name)
            item = plan(media, nframes=2)
            frames = decoder.read(data, media, item, path.name)
            assert tuple(frames.shape) == (item.num_frames, 3, item.height, item.width)
            read += 1
            assert not expectations.get(path.name, "").startswith("skip the sample"), path.name
        except DataError:
            skipped += 1
            assert "skip" in expectations.get(path.name, ""), path.name
    assert (read, skipped) == ((39, 0) if folder == "real/video" else (read, skipped))
    assert read >= 15
