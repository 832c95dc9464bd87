"""What a cleaning rule sees of a sample: annotations in pixels of the stored pictures, and the pictures' sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.samples import Media
from data_pipelines.sources.item import Annotations


@dataclass(frozen=True, slots=True)
class Sample:
    """`media` in document order; `score` is the source's similarity of picture and text, None where it gives none."""

    key: str
    annotations: Annotations
    media: tuple[Media, ...] = ()
    score: float | None = None

    def having(self, **changed: Any) -> Sample:
        """The sample with some of its annotations replaced."""
        return replace(self, annotations=replace(self.annotations, **changed))
