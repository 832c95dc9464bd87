"""The cache of decoded clips: what it returns, what it refuses, its bound, and many processes at once."""

import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from sources.conftest import clip_bytes

from data_pipelines.config import LoaderConfig, SourceConfig
from data_pipelines.decode.clip_cache import SETS, ClipCache, open_clip_cache
from data_pipelines.decode.video import ClipDecoder, probe_video
from data_pipelines.loader import PackLoader
from data_pipelines.samples import MediaPlan
from data_pipelines.shards.writer import ShardWriter

PLAN = MediaPlan("video", (2, 4, 4), 4)  # 4 frames of 56 x 56 pixels
SHAPE = (4, 56, 56, 3)


@pytest.fixture(scope="module")
def data():
    return clip_bytes(frames=10, width=64, height=48)


@pytest.fixture(scope="module")
def media(data):
    return probe_video(data, "0.mp4", "key")


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder):
    """Bytes of all files, those that vanish meanwhile left out."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def test_a_clip_seen_before_is_read_without_its_decoder(tmp_path, data, media):
    first = ClipDecoder(cache=ClipCache(tmp_path, 1 << 24))
    frames = first.read(data, media, PLAN, "key")
    first.close()
    again = ClipDecoder(cache=ClipCache(tmp_path, 1 << 24))
    held = again.read(data, media, PLAN, "key")
    assert again._process is None
    assert held.shape == frames.shape == (4, 3, 56, 56)
    assert torch.equal(held, frames)
    assert [path.stat().st_size for path in files(tmp_path)] == [4 * 56 * 56 * 3 + 4]


def test_another_plan_clip_size_or_backend_is_another_entry(tmp_path, data, media):
    cache = ClipCache(tmp_path, 1 << 24)
    plans = [PLAN, replace(PLAN, grid_thw=(2, 4, 6)), replace(PLAN, grid_thw=(1, 4, 4), num_frames=2)]
    names = {cache.name(data, media, plan, "auto") for plan in plans}
    names |= {cache.name(data, media, PLAN, "pyav"), cache.name(data + b"\0", media, PLAN, "auto")}
    names |= {cache.name(data, replace(media, width=96), PLAN, "auto")}
    assert len(names) == 6
    assert cache.name(data, media, replace(PLAN, shrunk=True), "auto") in names  # the same pixels, however decided


def test_a_damaged_or_cut_entry_is_decoded_again(tmp_path, data, media):
    cache = ClipCache(tmp_path, 1 << 24)
    decoder = ClipDecoder(cache=cache)
    frames = decoder.read(data, media, PLAN, "key")
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for content in (whole[:-1], b"", whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], bytes(len(whole))):
        path.write_bytes(content)
        assert cache.get(cache.name(data, media, PLAN, "auto"), SHAPE) is None
        assert torch.equal(decoder.read(data, media, PLAN, "key"), frames)
        assert path.read_bytes() == whole
    decoder.close()


def test_what_was_not_read_for_longest_makes_room(tmp_path):
    entry = np.zeros((2, 28, 28, 3), np.uint8)  # 4704 bytes and 4 of checksum
    cache = ClipCache(tmp_path, SETS * 3 * 4708)  # three in each set
    for number in range(200):
        cache.put(f"{number}", entry + number % 256)
        os.utime(next(path for path in files(tmp_path) if path.name == f"{number}"), ns=(number * 10**9,) * 2)
        assert cache.get("0", entry.shape) is not None  # reading it each time keeps it
    assert size_of(tmp_path) <= SETS * 3 * 4708
    assert cache.get("199", entry.shape)[0, 0, 0, 0] == 199
    assert cache.get("1", entry.shape) is None


def test_a_clip_larger_than_its_share_is_not_kept(tmp_path):
    cache = ClipCache(tmp_path, SETS * 4000)
    cache.put("large", np.zeros((2, 28, 28, 3), np.uint8))
    assert files(tmp_path) == []


def work(folder, seed, rounds):
    cache, rng, wrong = ClipCache(folder, SETS * 6 * 4708), np.random.default_rng(seed), 0
    for number in rng.integers(0, 150, rounds):
        frames = np.full((2, 28, 28, 3), number, np.uint8)
        held = cache.get(f"{number}", frames.shape)
        if held is None:
            cache.put(f"{number}", frames)
        else:
            wrong += not np.array_equal(held, frames)
    os._exit(wrong)


@pytest.mark.parametrize(("processes", "rounds"), [(4, 400), pytest.param(8, 6000, marks=pytest.mark.slow)])
def test_processes_share_it_within_its_bound(tmp_path, processes, rounds):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, seed, rounds)) for seed in range(processes)]
    for worker in workers:
        worker.start()
    largest = 0
    while any(worker.is_alive() for worker in workers):
        largest = max(largest, size_of(tmp_path))
    # the bound, and one entry that each process is writing
    assert 0 < largest <= (SETS * 6 + processes) * 4708
    assert [worker.exitcode for worker in workers] == [0] * processes
    assert size_of(tmp_path) <= SETS * 6 * 4708
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]


def test_a_folder_that_fills_or_vanishes_costs_the_cache_only(tmp_path, data, media):
    folder = tmp_path / "cache"
    decoder = ClipDecoder(cache=ClipCache(folder, 1 << 24))
    folder.write_text("no folder")
    frames = decoder.read(data, media, PLAN, "key")
    assert frames.shape == (4, 3, 56, 56)
    decoder.close()


def test_it_is_off_unless_asked_for_and_a_bad_folder_is_named(tmp_path):
    assert open_clip_cache(LoaderConfig()) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"loader.clip_cache=.*file/x: no such folder can be made"):
        open_clip_cache(LoaderConfig(clip_cache=f"{tmp_path}/file/x"))
    with pytest.raises(ValueError, match="clip_cache_gb=0: must be above 0"):
        LoaderConfig(clip_cache=f"{tmp_path}", clip_cache_gb=0)


def test_packs_are_the_same_with_it_without_it_and_from_it(tmp_path, tiny, data):
    with ShardWriter(tmp_path, "s") as writer:
        for number in range(4):
            writer.write(f"{number}", {"caption": "a dog"}, {"0.mp4": data})
    config = tiny.config()
    small = replace(config.media, video_min_pixels=3136, video_max_pixels=3136)
    config = replace(config, sources={"s": SourceConfig((f"{tmp_path}/*.tar",))}, media=small)
    cached = replace(config, loader=replace(config.loader, clip_cache=str(tmp_path / "cache"), clip_cache_gb=0.1))
    found = []
    for settings in (config, cached, cached):
        loader = PackLoader(settings, tiny.tokenizer, 1, 0, 1, 0)
        found.append(next(iter(loader))[0].video_patches)
        loader.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert len(files(tmp_path / "cache")) == 1  # one clip, taken alike four times
