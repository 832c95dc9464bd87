"""Settings of the data way as frozen dataclasses. YAML becomes these at one border (`qwen2vl_train.config`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipelines.errors import UserError

Template = Literal["plain", "chatml"]
Positions = Literal["mrope", "1d"]

# What one record, and one picture or clip as stored, may take: refused before it is read, wherever it lies.
MAX_RECORD_BYTES = 64 << 20
MAX_MEDIA_BYTES = 1 << 30
MAX_PAUSE_S = 30.0  # between two tries of a request
MAX_POOL = 4096  # open samples of all kinds together: their state stays under 64 KB


@dataclass(frozen=True)
class MediaConfig:
    """Pixel and frame budgets. Pixels count one resized frame; a token is 28 x 28 pixels.

    `max_media_tokens` is the hard limit for all media of a sample (the paper: 16,384 per video); a sample's media get
    at most min(max_media_tokens, a pack's max_patches / 4, max_tokens - its other tokens), shared among them.
    `max_source_pixels` and `max_source_bytes` are checked from headers before anything is decoded.
    """

    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 16384 * 28 * 28
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    max_media_tokens: int = 16384
    max_source_pixels: int = 200_000_000
    max_source_bytes: int = MAX_MEDIA_BYTES
    video_backend: Literal["auto", "decord", "pyav", "torchcodec"] = "auto"
    decode_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        token = 28 * 28
        least = {"min_pixels": 0, "max_pixels": token, "video_min_pixels": 0, "video_max_pixels": token}
        for name, low in {**least, "min_frames": 0, "max_frames": 1, "max_media_tokens": 1}.items():
            if getattr(self, name) < low:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {low}")
        for name in ("fps", "decode_timeout_s", "max_source_pixels", "max_source_bytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)}: must be above 0 and finite")


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the mixture: `shards` are paths or globs of webdataset tars, `weight` its share of samples drawn.

    `epochs` instead of `weight`, for all sources or none: shares by epochs x samples, so that all end together.
    `schedule` changes the weight during training: ((tokens, weight), ...), each valid from that many planned tokens on.
    """

    shards: tuple[str, ...]
    weight: float = 1.0
    max_error_rate: float = 0.05
    epochs: float | None = None
    schedule: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.epochs is not None and (self.weight != 1.0 or self.schedule):
            raise UserError(f"epochs={self.epochs} decides the share: leave out weight and schedule")
        if any(a[0] >= b[0] for a, b in zip(self.schedule, self.schedule[1:], strict=False)):
            raise UserError(f"schedule={self.schedule}: token counts must rise")
        if self.schedule and self.schedule[0][0] < 0:
            raise UserError(f"schedule={self.schedule}: training has no negative token counts; begin at 0 or later")


@dataclass(frozen=True)
class PlanConfig:
    """Packing: at most `max_tokens` LLM tokens and `max_patches` ViT patches a pack, chosen from a pool of samples.

    `packing` "balanced" composes packs towards the mean cost of the model too, so that ranks wait less for one another;
    "task" packs only samples of one task kind together (as Qwen-VL did), "single" one document a pack.
    Order: blocks of `block_size` neighbouring samples, mixed over `window_shards` shards that are open together.
    `size_temperature` T multiplies each source's weight by its number of samples to the power 1/T (None: does not).
    """

    max_tokens: int = 16384
    max_patches: int = 65536
    pool_size: int = 256
    block_size: int = 1024
    window_shards: int = 8
    packing: Literal["pool", "balanced", "task", "single"] = "pool"
    size_temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_patches", "pool_size", "block_size", "window_shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_patches < 4:
            raise UserError(f"max_patches={self.max_patches}: a token of a picture takes 4")
        if self.pool_size > MAX_POOL:
            raise UserError(f"pool_size={self.pool_size}: at most {MAX_POOL}, since every checkpoint keeps the pool")
        if self.size_temperature is not None and not self.size_temperature > 0:
            raise UserError(f"size_temperature={self.size_temperature}: must be above 0, or null")


@dataclass(frozen=True)
class LoaderConfig:
    """Worker processes per rank and packs prefetched by each; one more process plans ahead of them.

    `num_workers` 0 plans and decodes in the training process.

    `prefetch_mb` bounds the shared memory of a rank's prefetched packs; fewer are made ahead where it is small.
    `sample_timeout_s`: a sample that takes longer is left out, and its worker replaced.
    `clip_cache`: a folder on local disk that keeps decoded clips, at most `clip_cache_gb` (10^9 bytes); None: none.
    """

    num_workers: int = 2
    prefetch_factor: int = 2
    prefetch_mb: int = 4096
    sample_timeout_s: float = 300.0
    clip_cache: str | None = None
    clip_cache_gb: float = 50.0

    def __post_init__(self) -> None:
        for name, least in {"num_workers": 0, "prefetch_factor": 1, "prefetch_mb": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        if not self.sample_timeout_s > 0:
            raise UserError(f"sample_timeout_s={self.sample_timeout_s}: must be above 0")
        if not self.clip_cache_gb > 0:
            raise UserError(f"clip_cache_gb={self.clip_cache_gb}: must be above 0; clip_cache=null keeps no clips")


@dataclass(frozen=True)
class RemoteConfig:
    """Shards behind URLs (`https://`, `s3://`, `gs://`, ...): read by blocks of `block_kb`, kept in `cache_dir`.

    The cache takes at most `cache_mb`, and half of that again for shards that are fetched whole, because a server gives
    no ranges. A node's processes share it, and at most `max_requests` of them read at once.
    A request ends after `timeout_s` and is repeated up to `retries` times, after `backoff_s`, twice that, and so on.
    """

    cache_dir: str = "~/.cache/qwen2vl-train/shards"
    cache_mb: int = 10240
    block_kb: int = 4096
    max_requests: int = 16
    retries: int = 6
    backoff_s: float = 0.5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.block_kb < 4 or self.max_requests < 1 or self.retries < 0 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise UserError(
                f"block_kb={self.block_kb} (at least 4), max_requests={self.max_requests} (1), retries={self.retries} "
                f"(0), timeout_s={self.timeout_s} (above 0), backoff_s={self.backoff_s} (0): out of range"
            )
        if self.cache_mb * 1024 < 128 * self.block_kb:
            raise UserError(
                f"cache_mb={self.cache_mb} holds fewer than 128 blocks of block_kb={self.block_kb}: "
                f"set cache_mb to {-(-128 * self.block_kb // 1024)} or more, or lower block_kb"
            )

    @property
    def longest_s(self) -> float:
        """Seconds after which a request has come or failed for good, whatever its server does."""
        return (self.retries + 1) * (self.timeout_s + MAX_PAUSE_S)


@dataclass(frozen=True)
class DataConfig:
    """A stage's data: the mixture (name → source), the text template, budgets, packing and workers.

    template "plain" writes prompt + answer + <|endoftext|> (Qwen-VL's pretraining form); "chatml" the chat template.
    `reader` "webdataset" reads tars once from start to end, without an index (docs/data.md: what that costs).
    `vision_ids` writes "Picture 1: ", "Video 1: " before each media item, as the chat template's `add_vision_id`.
    `positions` "1d" counts tokens where "mrope" gives media three axes; a run takes it from its model.
    """

    sources: dict[str, SourceConfig]
    template: Template = "plain"
    media: MediaConfig = field(default_factory=MediaConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    vision_ids: bool = False
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    reader: Literal["index", "webdataset"] = "index"
    positions: Positions = "mrope"
