"""From the facts of images and clips to their sizes in tokens, without a pixel.

Enters: `Media` facts (from headers), per-part overrides, the sample's text tokens. Leaves: one `MediaPlan` per item.
The planner (which packs samples on lengths alone) and the encoder (which makes those lengths come true) call the same
function, so plan and pixels cannot disagree. Pure integer and float64 arithmetic: the same on every machine.

1. Each item gets its natural size: `smart_resize` within its pixel limits; a clip also its number of frames.
2. If the items together exceed what the sample may have (`max_media_tokens`, the patches of a pack, the tokens that the
   text leaves), all shrink by one common factor on pixels; where even one token per frame pair is too much, clips lose
   frames. Nothing is ever cut.

A token is 28 x 28 pixels; a clip's token covers two frames. Cost: about 2 us for a sample with one image, 30 us per
item for a sample that must shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from data_pipelines.config import MediaConfig
from data_pipelines.errors import BudgetError, MediaError
from data_pipelines.samples import Media, MediaPlan, MediaRef

TOKEN_SIDE = 28
TOKEN_PIXELS = TOKEN_SIDE * TOKEN_SIDE
PATCHES_PER_TOKEN = 4
MAX_ASPECT = 200
_SCALE_STEPS = 4096  # resolution of the search for the common factor: 0.02% of the pixels


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size an image is resized to: multiples of 28, area in [min_pixels, max_pixels], aspect ratio kept.

    Exactly transformers' rule (`models.qwen2_vl.image_processing_qwen2_vl.smart_resize`, factor 28), quirks included:
    banker's rounding (42 -> 56), and an area over `max_pixels` for a strip that cannot be thinner than 28 pixels.

    >>> smart_resize(700, 1000, 3136, 12845056)  # 36 x 25 = 900 tokens
    (700, 1008)

    Raises:
        ValueError: a side below 1 pixel, or an aspect ratio over 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{width} x {height} pixels: an image needs at least 1 x 1")
    if height > MAX_ASPECT * width or width > MAX_ASPECT * height:
        raise ValueError(f"{width} x {height} pixels: aspect ratio over {MAX_ASPECT}; crop it or drop the sample")
    rows = round(height / TOKEN_SIDE)
    columns = round(width / TOKEN_SIDE)
    area = rows * columns * TOKEN_PIXELS
    if area > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / beta / TOKEN_SIDE))
        columns = max(1, math.floor(width / beta / TOKEN_SIDE))
    elif area < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / TOKEN_SIDE)
        columns = math.ceil(width * beta / TOKEN_SIDE)
    return rows * TOKEN_SIDE, columns * TOKEN_SIDE


def within_patches(config: MediaConfig, max_patches: int) -> MediaConfig:
    """`config` where a sample's media must fit into a pack of `max_patches`, too: for the planner and the encoder."""
    return replace(config, max_media_tokens=min(config.max_media_tokens, max_patches // PATCHES_PER_TOKEN))


def plan_media(
    medias: Sequence[tuple[Media, MediaRef]], text_tokens: int, config: MediaConfig, max_tokens: int, key: str
) -> tuple[MediaPlan, ...]:
    """Sizes of a sample's media, in document order, such that the document fits.

    `text_tokens` are the document's other tokens (vision tags included). The plans' tokens sum to at most
    min(config.max_media_tokens, max_tokens - text_tokens): the paper allows 16,384 for a clip, shared here among all
    media of a sample. Plans that lost pixels or frames to this limit have `shrunk` set.

    Raises:
        BudgetError: the text alone fills `max_tokens`, or one token per item is still too much.
        MediaError: an aspect ratio over 200 or an empty image (reason "bad_size").
    """
    limit = min(config.max_media_tokens, max_tokens - text_tokens)
    try:
        wishes = [_natural_plan(media, ref, config) for media, ref in medias]
    except ValueError as error:
        raise MediaError(key, "bad_size", str(error)) from error
    total = 0
    for wish in wishes:
        total += wish.num_tokens
    if total <= limit:
        return tuple(wishes)
    if len(wishes) > limit or text_tokens > max_tokens:
        raise BudgetError(key, "too_long", _what_fits(text_tokens, len(wishes), total, config, max_tokens))
    return _shrink_to_fit(medias, wishes, limit)


def _what_fits(text_tokens: int, num_media: int, media_tokens: int, config: MediaConfig, max_tokens: int) -> str:
    """Why a sample does not fit, and the smallest limits with which it does."""
    least, whole = text_tokens + num_media, text_tokens + media_tokens  # a token each, or as they are
    needs = [f"max_tokens={least}"] if least > max_tokens else []
    media_limits = f"max_media_tokens={num_media} (and max_patches of {PATCHES_PER_TOKEN * num_media} at least)"
    needs += [media_limits] if num_media > config.max_media_tokens else []
    shrunk = ""
    if least < whole:
        patches = PATCHES_PER_TOKEN * media_tokens
        larger = f", max_media_tokens={media_tokens} and max_patches={patches}"
        larger = larger if media_tokens > config.max_media_tokens else ""
        shrunk = f" with its media shrunk to a token each (max_tokens={whole}{larger} as they are)"
    return (
        f"{text_tokens} text tokens and {num_media} media items do not fit in max_tokens={max_tokens} "
        f"(and media in {config.max_media_tokens}, by max_media_tokens or max_patches / {PATCHES_PER_TOKEN}): "
        f"it needs {' and '.join(needs)}{shrunk}; raise it, or split the sample"
    )


def count_frames(media: Media, ref: MediaRef, config: MediaConfig) -> int:
    """Frames sampled from a clip: even, at least 2; `ref.nframes` if given, else duration x fps within the limits.

    Never more than the clip has, rounded down to even; a clip of one frame gives 2 (its frame twice).
    """
    duration_s = media.duration_s if media.duration_s > 0 else media.frames / media.fps if media.fps > 0 else 0.0
    if ref.nframes is not None:
        wanted = float(ref.nframes)
    else:
        fps = config.fps if ref.fps is None else ref.fps
        wanted = max(duration_s * fps, math.ceil(config.min_frames / 2) * 2)
    wanted = min(wanted, config.max_frames)
    if media.frames > 0:
        wanted = min(wanted, media.frames)
    # A header's 9.9999 s is 10 s: without the rounding it would lose two frames.
    return max(2, math.floor(round(wanted, 3) / 2) * 2)


def _natural_plan(media: Media, ref: MediaRef, config: MediaConfig) -> MediaPlan:
    """The plan of one item on its own, by its limits (the part's, else the stage's). ValueError for a bad size."""
    if media.kind == "image":
        min_pixels = config.min_pixels if ref.min_pixels is None else ref.min_pixels
        max_pixels = config.max_pixels if ref.max_pixels is None else ref.max_pixels
        num_frames, steps = 1, 1
    else:
        min_pixels = config.video_min_pixels if ref.min_pixels is None else ref.min_pixels
        max_pixels = config.video_max_pixels if ref.max_pixels is None else ref.max_pixels
        num_frames = count_frames(media, ref, config)
        steps = num_frames // 2
    height, width = smart_resize(media.height, media.width, min(min_pixels, max_pixels), max_pixels)
    return MediaPlan(media.kind, (steps, height // 14, width // 14), num_frames)


def _bounded_tokens(height: int, width: int, max_pixels: float) -> tuple[int, int]:
    """Rows and columns of tokens within `max_pixels`, strictly (smart_resize is not strict for thin strips)."""
    cap = max(TOKEN_PIXELS, int(max_pixels))
    new_height, new_width = smart_resize(height, width, min(TOKEN_PIXELS, cap), cap)
    rows, columns, most = new_height // TOKEN_SIDE, new_width // TOKEN_SIDE, cap // TOKEN_PIXELS
    if rows * columns > most:
        if rows > columns:
            rows = max(1, most // columns)
        else:
            columns = max(1, most // rows)
    return rows, columns


def _shrink_to_fit(
    medias: Sequence[tuple[Media, MediaRef]], wishes: Sequence[MediaPlan], limit: int
) -> tuple[MediaPlan, ...]:
    """All items by one common factor on pixels, the largest (in 4096ths) that fits; then, if need be, on frames.

    Needs len(wishes) <= limit. Bisection keeps the invariant that its lower end fits, so the result fits even where
    rounding makes the count rise locally as pixels fall.
    """

    def sizes(step: int) -> list[tuple[int, int]]:
        return [
            _bounded_tokens(media.height, media.width, wish.height * wish.width * step / _SCALE_STEPS)
            for (media, _), wish in zip(medias, wishes, strict=True)
        ]

    def pairs(step: int) -> list[int]:
        return [max(1, wish.grid_thw[0] * step // _SCALE_STEPS) for wish in wishes]

    def total(steps: Sequence[int], grids: Sequence[tuple[int, int]]) -> int:
        return sum(t * h * w for t, (h, w) in zip(steps, grids, strict=True))

    all_pairs = pairs(_SCALE_STEPS)
    smallest = sizes(0)
    if total(all_pairs, smallest) <= limit:
        best = _largest(lambda step: total(all_pairs, sizes(step)) <= limit)
        times, grids = all_pairs, sizes(best)
    else:
        best = _largest(lambda step: total(pairs(step), smallest) <= limit)
        times, grids = pairs(best), smallest
    plans = []
    for wish, t, (h, w) in zip(wishes, times, grids, strict=True):
        grid = (t, 2 * h, 2 * w)
        frames = 1 if wish.kind == "image" else 2 * t
        plans.append(MediaPlan(wish.kind, grid, frames, shrunk=grid != wish.grid_thw))
    return tuple(plans)


def _largest(fits: Callable[[int], bool]) -> int:
    """The end of the bisection over 0.._SCALE_STEPS: a step that fits, its successor does not. `fits(0)` holds."""
    low, high = 0, _SCALE_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
