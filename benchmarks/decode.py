"""How fast pictures become patches and clips become frames, one thread, in CPU time.

    python -m benchmarks.decode [--images FOLDER] [--clips FOLDER] [--seconds 20]

Compares, on the same JPEG files, decoding + resizing + patches here with transformers' Qwen2-VL processors (the Pillow
one; the torchvision one where torchvision imports) and with bare simplejpeg decoding; and the clip decoders with each
other. Runs are interleaved and medians of rounds are printed, since other processes share the machine. Without folders
it generates pictures (0.3 megapixels) and a clip (720p, H.264, 20 s). The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from data_pipelines.config import MediaConfig
from data_pipelines.decode.image import decode_image, probe_image
from data_pipelines.decode.video import ClipDecoder, probe_video
from data_pipelines.encode.budget import plan_media
from data_pipelines.encode.patches import clip_to_patches, image_to_patches, resize_image
from data_pipelines.errors import DataError
from data_pipelines.samples import MediaRef

MAX_PIXELS = 1280 * 28 * 28
MIN_PIXELS = 4 * 28 * 28
CLIP_CONFIG = MediaConfig(video_max_pixels=256 * 784)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--clips", type=Path, help="folder of clips")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each of the two parts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = read_folder(args.images, (".jpg", ".jpeg"), 64) if args.images else make_pictures()
    clips = read_folder(args.clips, (".mp4", ".mov", ".mkv", ".webm", ".avi"), 24) if args.clips else [make_clip()]
    rates = measure(image_ways(), pictures, args.seconds)
    for name, rate in rates.items():
        print(f"{name:28} {rate:8.1f} images/s per core")
    clip_rates = measure_clips(clips, args.seconds)
    for name, seconds in clip_rates.items():
        print(f"{name:28} {'not installed' if seconds is None else f'{seconds:8.1f} clip seconds per CPU second'}")
    fast = rates.get("transformers, torchvision")
    summary = {
        "ratio_hf_pillow": round(rates["this project"] / rates["transformers, Pillow"], 2),
        "ratio_hf_fast": round(rates["this project"] / fast, 2) if fast else None,
        "share_of_bare_decode": round(rates["this project"] / rates["simplejpeg alone"], 3),
        "clip_seconds_per_cpu_second": {name: rate and round(rate, 1) for name, rate in clip_rates.items()},
    }
    print(json.dumps(summary))


def image_ways() -> dict[str, Callable[[bytes], object]]:
    """Each way of turning JPEG bytes into what a ViT takes; "simplejpeg alone" decodes and does no more."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def ours(data: bytes) -> object:
        media = probe_image(data, "0.jpg", "key")
        (plan,) = plan_media([(media, MediaRef("0.jpg"))], 0, config, 16384, "key")
        return image_to_patches(resize_image(decode_image(data, "key", 1 << 30), plan.height, plan.width))

    config = MediaConfig(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    pillow = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    ways: dict[str, Callable[[bytes], object]] = {
        "this project": ours,
        "simplejpeg alone": lambda data: simplejpeg.decode_jpeg(data),
        "transformers, Pillow": lambda data: pillow(Image.open(io.BytesIO(data)), return_tensors="pt"),
    }
    with contextlib.suppress(ImportError, RuntimeError):  # torchvision absent, or built for another torch
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        fast = Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
        ways["transformers, torchvision"] = lambda data: fast(Image.open(io.BytesIO(data)), return_tensors="pt")
    return ways


def measure(ways: dict[str, Callable[[bytes], object]], pictures: list[bytes], seconds: float) -> dict[str, float]:
    """Images per CPU second of each way: medians over rounds in which every way sees the same picture once."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in pictures] for name in ways}
    for way in ways.values():
        way(pictures[0])
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 2 or time.monotonic() < end:
        for number, data in enumerate(pictures):
            for name, way in ways.items():
                start = time.process_time()
                way(data)
                times[name][number].append(time.process_time() - start)
        rounds += 1
    return {name: len(pictures) / sum(statistics.median(each) for each in found) for name, found in times.items()}


def measure_clips(clips: list[bytes], seconds: float) -> dict[str, float | None]:
    """Seconds of clip read (2 fps, resized, made into patches) per CPU second, the decoder process included."""
    usable = []
    for number, data in enumerate(clips):
        with contextlib.suppress(DataError):
            media = probe_video(data, "0.mp4", f"clip {number}")
            (plan,) = plan_media([(media, MediaRef("0.mp4"))], 0, CLIP_CONFIG, 16384, "key")
            usable.append((data, media, plan))
    rates: dict[str, float | None] = {}
    for backend in ("decord", "pyav", "torchcodec"):
        spent = shown = 0.0
        end = time.monotonic() + seconds / 3
        missing = False
        while not missing and (shown == 0 or time.monotonic() < end):
            before = cpu_seconds()
            # Its own process per round: only ended processes are counted by getrusage.
            with contextlib.closing(ClipDecoder(backend)) as decoder:
                for data, media, plan in usable:
                    try:
                        clip_to_patches(decoder.read(data, media, plan, "key"))
                        shown += media.duration_s
                    except DataError as error:
                        missing = missing or error.reason == "no_backend"
            spent += cpu_seconds() - before
        rates[backend] = None if missing else shown / spent
    return rates


def cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def read_folder(folder: Path, suffixes: tuple[str, ...], most: int) -> list[bytes]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)[:most]
    if not files:
        raise SystemExit(f"{folder}: no file ends in {', '.join(suffixes)}")
    return [path.read_bytes() for path in files]


def make_pictures(count: int = 16) -> list[bytes]:
    """JPEGs of 640 x 480 with detail at several scales, about 100 KB each."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        scales = [Image.fromarray(rng.integers(0, 256, (480 // s, 640 // s, 3), dtype=np.uint8)) for s in (4, 16, 80)]
        layers = [np.asarray(scale.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32) for scale in scales]
        pixels = (0.2 * layers[0] + 0.3 * layers[1] + 0.5 * layers[2]).astype(np.uint8)
        made.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90))
    return made


def make_clip(count: int = 600, width: int = 1280, height: int = 720) -> bytes:
    """20 s of 720p H.264: a textured square moving over a textured background."""
    import av

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (45, 80, 3), dtype=np.uint8))
    background = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    square = rng.integers(0, 256, (120, 120, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for number in range(count):
            pixels = background.copy()
            left = (number * 7) % (width - 120)
            pixels[300:420, left : left + 120] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    main()
