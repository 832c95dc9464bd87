"""How held-out answers are scored, task by task, and what a constant answer would score.

Enters: pairs of true and predicted text as the tokenizer writes them (special tokens visible). Leaves: a figure from 0
to 1 per task. A box counts as found at IoU >= 0.5 (RefCOCO's Acc@0.5), measured on the 0 to 1000 grid.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipelines.encode.boxes import parse_boxes

BoxXyxy = tuple[float, float, float, float]


@dataclass(frozen=True)
class Metric:
    """`name` as it appears in summaries; `hit(truth, prediction)` tells whether one answer counts."""

    name: str
    hit: Callable[[str, str], bool]


def same_text(truth: str, prediction: str) -> bool:
    """Equal up to surrounding white space and letter case."""
    return truth.strip().lower() == prediction.strip().lower()


def same_boxes(truth: str, prediction: str) -> bool:
    """As many predicted as true boxes, each true box matched in order with IoU >= 0.5."""
    wanted, found = parse_boxes(truth), parse_boxes(prediction)
    pairs = list(zip(wanted, found, strict=False))
    return bool(wanted) and len(wanted) == len(found) and all(iou(a, b) >= 0.5 for a, b in pairs)


def iou(first: BoxXyxy, second: BoxXyxy) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for boxes without area.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - overlap
    return overlap / union if union > 0 else 0.0


def _area(box: BoxXyxy) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


METRICS = {
    "caption": Metric("caption_exact", same_text),
    "referring": Metric("referring_acc50", same_boxes),
    "ocr": Metric("ocr_exact", same_text),
    "vqa": Metric("vqa_accuracy", same_text),
    "video_direction": Metric("clip_direction", same_text),
}


def metric_of(task: str) -> Metric:
    """The metric of a task; an unlisted task is scored by exact text as `<task>_exact`."""
    return METRICS.get(task) or Metric(f"{task}_exact", same_text)


def constant_baseline(task: str, questions: Sequence[str], truths: Sequence[str]) -> float:
    """What a blind model could score: one constant answer per kind of question, chosen with the truths known (0 to 1).

    The first two words tell the kind ("How many", "What color"). The constant answers tried are the true ones.
    """
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for question, truth in zip(questions, truths, strict=True):
        kinds[tuple(question.lower().split()[:2])].append(truth)
    metric = metric_of(task)
    hits = 0
    for group in kinds.values():
        candidates = [text for text, _ in Counter(group).most_common(500)]
        hits += max(sum(metric.hit(truth, candidate) for truth in group) for candidate in candidates)
    return hits / max(1, len(truths))
