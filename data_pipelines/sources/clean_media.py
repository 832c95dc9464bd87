"""Rules on pictures: shape, size, and the source's own score of picture and text."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipelines.errors import UserError
from data_pipelines.sources.sample import Sample


@dataclass(frozen=True)
class AspectRatio:
    """Drop samples with a picture or clip whose longer side is more than `max` times the shorter one."""

    max: float = 4.0

    def __post_init__(self) -> None:
        if self.max < 1:
            raise UserError(f"aspect_ratio.max = {self.max}: needs at least 1")

    def apply(self, sample: Sample) -> Sample | None:
        """None where a picture is too long."""
        for media in sample.media:
            if max(media.width, media.height) > self.max * min(media.width, media.height):
                return None
        return sample


@dataclass(frozen=True)
class PictureSize:
    """Drop samples with a picture or clip that has a side below `min_side`, or less than `min_pixels` in all."""

    min_side: int = 64
    min_pixels: int = 0

    def apply(self, sample: Sample) -> Sample | None:
        """None where a picture is too small."""
        for media in sample.media:
            if min(media.width, media.height) < self.min_side or media.width * media.height < self.min_pixels:
                return None
        return sample


@dataclass(frozen=True)
class Similarity:
    """Drop samples whose source says that picture and text match less than `min` (a CLIP score, say).

    Samples without a score pass, unless `required`.
    """

    min: float = 0.3
    required: bool = False

    def apply(self, sample: Sample) -> Sample | None:
        """None where the score is too low."""
        if sample.score is None:
            return None if self.required else sample
        return sample if sample.score >= self.min else None
