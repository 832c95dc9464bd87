"""Vectorised lengths against the encoder's own rule, for every kind of media and limit."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.config import MediaConfig, PlanConfig
from data_pipelines.encode.budget import plan_media, within_patches
from data_pipelines.errors import DataError
from data_pipelines.index.samples import IndexRow, ShardIndex, index_columns
from data_pipelines.index.source import ShardTable
from data_pipelines.plan.lengths import sample_lengths
from data_pipelines.samples import Media, MediaRef


def table(samples, text, truncatable=None):
    """A shard of samples, each a list of (Media, MediaRef)."""
    arrays, meta = index_columns([IndexRow(str(row), "t", {}, media) for row, media in enumerate(samples)])
    index = ShardIndex(
        SimpleNamespace(arrays=arrays, meta={**meta, "problems": [], "unlisted": {}}, text=lambda name, row: str(row))
    )
    cut = np.zeros(len(samples), np.uint8) if truncatable is None else np.array(truncatable, np.uint8)
    return ShardTable(index, np.array(text, np.int32), cut, (), {})


def random_media(rng):
    width, height = (int(side) for side in np.exp(rng.uniform(0, np.log(9000), 2)))
    low, high = sorted(int(pixels) for pixels in rng.integers(700, 900_000, 2))
    limits = {"min_pixels": low if rng.random() < 0.2 else None, "max_pixels": high if rng.random() < 0.2 else None}
    if rng.random() < 0.6:
        return Media("m", "image", width, height), MediaRef("m", kind="image", **limits)
    frames, fps = int(rng.integers(1, 2000)), float(rng.choice([0.0, 12.5, 24, 25, 29.97, 30]))
    duration = 0.0 if rng.random() < 0.2 else round(float(rng.uniform(0.01, 90)), int(rng.integers(0, 6)))
    rate = {"fps": float(rng.uniform(0.3, 5))} if rng.random() < 0.2 else {}
    rate = {"nframes": int(rng.integers(1, 40))} if rng.random() < 0.2 else rate
    return Media("m", "video", width, height, frames, fps, duration), MediaRef("m", kind="video", **limits, **rate)


@pytest.mark.parametrize("seed", range(3))
def test_planned_lengths_are_the_encoders_for_every_sample(seed):
    rng = np.random.default_rng(seed)
    media = MediaConfig(max_pixels=1280 * 784, video_max_pixels=128 * 784, max_frames=64, max_media_tokens=3000)
    plan = PlanConfig(max_tokens=4096, max_patches=11_000)
    samples = [[random_media(rng) for _ in range(int(rng.choice([0, 1, 1, 1, 2, 5])))] for _ in range(1500)]
    text = rng.integers(1, 1500, 1500)
    rows = rng.permutation(1500)
    lengths, events = sample_lengths("s", table(samples, text), rows, media, plan)
    refused = {event.key for event in events}
    for i, row in enumerate(rows):
        try:
            limits = within_patches(media, plan.max_patches)
            plans = plan_media(samples[row], int(text[row]), limits, plan.max_tokens, str(row))
            expected = int(text[row]) + sum(item.num_tokens for item in plans)
            patches = sum(item.num_patches for item in plans)
        except DataError:
            expected, patches = -1, 0
        assert patches <= plan.max_patches
        assert int(lengths.tokens[i]) == expected, samples[row]
        assert (str(row) in refused) == (expected < 0)
        if expected > 0:
            assert int(lengths.patches[i]) == patches
            grids = [item.grid_thw for item in plans]
            assert int(lengths.patch_pairs[i]) == sum(t * (h * w) ** 2 for t, h, w in grids)


def test_durations_at_the_edge_of_rounding_agree():
    durations = [n + d for n in range(1, 30) for d in (0.0, 0.9995, 0.99949999, 0.99950001, 0.4995, 0.99975, 0.49975)]
    samples = [[(Media("m", "video", 56, 56, 0, 0.0, d), MediaRef("m", kind="video"))] for d in durations]
    media = MediaConfig(min_frames=2)
    lengths, _ = sample_lengths("s", table(samples, [1] * len(samples)), np.arange(len(samples)), media, PlanConfig())
    expected = [1 + sum(p.num_tokens for p in plan_media(s, 1, media, 16384, "k")) for s in samples]
    assert lengths.tokens.tolist() == expected


def test_long_plain_text_is_shortened_and_other_text_refused():
    plan = PlanConfig(max_tokens=100)
    found, events = sample_lengths(
        "s", table([[], [], []], [500, 500, -1], [1, 0, 0]), np.arange(3), MediaConfig(), plan
    )
    assert found.tokens.tolist() == [100, -1, -1]
    assert [(event.key, event.reason) for event in events] == [("1", "too_long")]
    assert "it needs max_tokens=500" in events[0].message


def lengths_of(medias, text, media, plan):
    return sample_lengths("s", table([medias], [text]), np.arange(1), media, plan)


def picture(width, height, **limits):
    return Media("m", "image", width, height), MediaRef("m", kind="image", **limits)


@pytest.mark.parametrize("num_media", [0, 1, 3])
def test_what_a_too_long_sample_needs_is_enough_and_no_less_is(num_media):
    """280 x 280 pixels are 100 tokens."""
    medias, media = [picture(280, 280)] * num_media, MediaConfig()
    _, (event,) = lengths_of(medias, 500, media, PlanConfig(max_tokens=100))
    needed = int(re.search(r"needs max_tokens=(\d+)", event.message)[1])
    assert needed == 500 + num_media
    assert lengths_of(medias, 500, media, PlanConfig(max_tokens=needed))[0].tokens.tolist() == [needed]
    assert lengths_of(medias, 500, media, PlanConfig(max_tokens=needed - 1))[0].tokens.tolist() == [-1]
    assert (f"max_tokens={500 + 100 * num_media} as they are" in event.message) == (num_media > 0)


def test_too_many_media_for_their_own_limit_name_it():
    _, (event,) = lengths_of([picture(280, 280)] * 3, 10, MediaConfig(max_media_tokens=2), PlanConfig(max_tokens=100))
    assert "it needs max_media_tokens=3 (and max_patches of 12 at least) with" in event.message


def test_media_shrink_to_the_patches_of_a_pack():
    """1120 x 1120 pixels are 1600 tokens, 6400 patches."""
    plan = PlanConfig(max_tokens=2000, max_patches=1000)
    found, events = lengths_of([picture(1120, 1120)], 10, MediaConfig(), plan)
    assert 900 <= found.patches[0] <= 1000
    assert found.tokens[0] == 10 + found.patches[0] // 4
    assert not events
    _, (event,) = lengths_of([picture(28, 28)] * 3, 10, MediaConfig(), PlanConfig(max_tokens=100, max_patches=8))
    assert "it needs max_media_tokens=3 (and max_patches of 12 at least)" in event.message
