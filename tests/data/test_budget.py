import numpy as np
import pytest

from data_pipelines.config import MediaConfig
from data_pipelines.encode.budget import count_frames, plan_media, smart_resize
from data_pipelines.errors import BudgetError, MediaError
from data_pipelines.samples import Media, MediaPlan, MediaRef

CONFIG = MediaConfig()
TOKEN = 28 * 28


def image(width, height, name="0.jpg"):
    return Media(name, "image", width, height)


def clip(width, height, frames, fps, name="0.mp4"):
    return Media(name, "video", width, height, frames, fps, frames / fps)


def plan(*medias, text=0, config=CONFIG, max_tokens=32768, **limits):
    return plan_media([(m, MediaRef(m.name, **limits)) for m in medias], text, config, max_tokens, "key")


@pytest.mark.parametrize(
    ("width", "height", "max_tokens", "size"),
    [
        (224, 224, 16384, (224, 224)),  # 8 x 8 = 64 tokens: 66 with its tags
        (10, 10, 16384, (56, 56)),  # up to min_pixels
        (1000, 700, 16384, (700, 1008)),  # 25 x 36 = 900 tokens
        (4000, 3000, 16384, (2996, 4004)),  # 107 x 143 = 15301
        (4000, 3000, 1280, (840, 1148)),  # 30 x 41 = 1230
        (42, 42, 16384, (56, 56)),  # round(1.5) = 2
        (70, 70, 16384, (56, 56)),  # round(2.5) = 2
        (5600, 28, 16384, (28, 5600)),  # aspect ratio 200 is allowed
    ],
)
def test_sizes_computed_by_hand(width, height, max_tokens, size):
    assert smart_resize(height, width, 56 * 56, max_tokens * TOKEN) == size


def test_size_rule_is_that_of_transformers():
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    random = np.random.default_rng(0)
    sides = np.concatenate(
        [random.integers(1, 400, (60_000, 2)), random.integers(1, 12_000, (60_000, 2))]
    )  # small ones hit the rounding and the lower limit, large ones the upper
    limits = [(4, 16384), (4, 1280), (4, 64), (256, 1280), (1, 1)]
    compared = 0
    for number, (height, width) in enumerate(sides.tolist()):
        if max(height, width) > 200 * min(height, width):
            continue
        low, high = limits[number % len(limits)]
        ours = smart_resize(height, width, low * TOKEN, high * TOKEN)
        assert ours == reference(height, width, 28, low * TOKEN, high * TOKEN), (height, width, low, high)
        compared += 1
    assert compared > 100_000


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (5628, 28), (0, 10), (10, 0)])
def test_impossible_sizes_are_errors_with_the_key(width, height):
    with pytest.raises(MediaError, match=r"key: .* \[bad_size\]"):
        plan(image(width, height))


def test_image_plan_counts_patches_and_tokens():
    (item,) = plan(image(1000, 700))
    assert item == MediaPlan("image", (1, 50, 72), 1, shrunk=False)
    assert (item.height, item.width, item.num_patches, item.num_tokens) == (700, 1008, 3600, 900)


def test_part_limits_replace_those_of_the_stage():
    assert plan(image(1000, 700), max_pixels=100 * TOKEN)[0].num_tokens == 8 * 11  # floor(8.37) x floor(11.95)
    assert plan(image(28, 28), min_pixels=TOKEN)[0].num_tokens == 1
    assert plan(image(224, 224), max_pixels=TOKEN)[0].num_tokens == 1  # below the stage's min_pixels: the part wins


@pytest.mark.parametrize(
    ("frames", "fps", "limits", "expected"),
    [
        (300, 30.0, {}, 20),  # 10 s at 2 fps
        (243, 25.0, {}, 18),  # 9.72 s: 19.44, down to even
        (60, 30.0, {}, 4),  # 2 s
        (30, 30.0, {}, 4),  # 1 s: min_frames
        (3, 30.0, {}, 2),  # three frames: not more than there are, even
        (1, 25.0, {}, 2),  # a single frame is shown twice
        (90_000, 25.0, {}, 768),  # an hour: max_frames
        (5, 0.0125, {}, 4),  # 400 s with 5 frames
        (300, 30.0, {"fps": 1.0}, 10),
        (300, 30.0, {"nframes": 7}, 6),
        (300, 30.0, {"nframes": 1}, 2),
    ],
)
def test_number_of_frames(frames, fps, limits, expected):
    assert count_frames(clip(640, 360, frames, fps), MediaRef("0.mp4", **limits), CONFIG) == expected


def test_frames_of_a_clip_with_imprecise_duration_are_not_lost():
    media = Media("0.mp4", "video", 640, 360, 300, 30.0, 9.9999)
    assert count_frames(media, MediaRef("0.mp4"), CONFIG) == 20


def test_short_clip_keeps_its_natural_size():
    (item,) = plan(clip(640, 360, 100, 25.0))  # 4 s: 8 frames; 13 x 23 = 299 tokens a pair
    assert item == MediaPlan("video", (4, 26, 46), 8, shrunk=False)
    assert item.num_tokens == 4 * 299


def test_long_clip_stays_within_the_papers_limit():
    (item,) = plan(clip(1280, 720, 23_040, 30.0))  # 768 s: 768 frames; the reference code gives 46,080 tokens
    assert item.num_frames == 768
    assert item.shrunk
    assert 15_000 <= item.num_tokens <= 16_384


def test_media_gives_way_to_the_text_of_the_sample():
    (item,) = plan(image(1000, 700), text=300, max_tokens=1000)
    assert item.shrunk
    assert 650 <= item.num_tokens <= 700


def test_items_shrink_in_proportion():
    first, second = plan(image(1400, 1400), image(700, 700, "1.jpg"), max_tokens=1000)  # natural: 2500 + 625
    assert first.shrunk
    assert second.shrunk
    assert 950 <= first.num_tokens + second.num_tokens <= 1000
    assert 3.5 < first.num_tokens / second.num_tokens < 4.5


def test_clip_loses_resolution_before_frames():
    (item,) = plan(clip(640, 360, 600, 30.0), max_tokens=40)  # 20 s: 40 frames in 20 pairs
    assert item.num_frames == 40
    assert item.num_tokens <= 40
    (item,) = plan(clip(640, 360, 600, 30.0), max_tokens=15)
    assert item == MediaPlan("video", (15, 2, 2), 30, shrunk=True)


def test_strips_are_held_to_the_limit_too():
    # transformers' rule gives a 28-pixel strip more than max_pixels; the sample's limit is strict.
    (item,) = plan(image(5600, 28), max_tokens=10)
    assert item.num_tokens == 10
    (item,) = plan(image(5600, 28), max_tokens=1)
    assert item.num_tokens == 1


def test_media_fits_whatever_the_limit():
    random = np.random.default_rng(1)
    for _ in range(300):
        medias = []
        for number in range(random.integers(1, 6)):
            width, height = (int(side) for side in random.integers(20, 3000, 2))
            if random.random() < 0.4:
                medias.append(clip(width, height, int(random.integers(1, 5000)), 30.0, f"{number}.mp4"))
            else:
                medias.append(image(width, height, f"{number}.jpg"))
        limit = int(random.integers(len(medias), 5000))
        plans = plan(*medias, text=7, max_tokens=7 + limit)
        assert sum(item.num_tokens for item in plans) <= limit
        assert all(item.grid_thw[1] % 2 == item.grid_thw[2] % 2 == 0 for item in plans)
        assert plans == plan(*medias, text=7, max_tokens=7 + limit)


@pytest.mark.parametrize(("items", "text", "max_tokens"), [(3, 10, 12), (1, 10, 10), (0, 11, 10), (1, 20, 10)])
def test_what_cannot_fit_is_an_error_with_the_numbers(items, text, max_tokens):
    medias = [image(100, 100, f"{number}.jpg") for number in range(items)]
    with pytest.raises(BudgetError, match=rf"key: {text} text tokens and {items} media .*max_tokens={max_tokens}"):
        plan(*medias, text=text, max_tokens=max_tokens)


def test_text_may_fill_the_pack_exactly():
    assert plan(text=10, max_tokens=10) == ()
