"""Cleaning at import: named rules, each with its settings and counts before and after.

Enters: a `Sample` (annotations already placed on their pictures, the pictures' sizes) and a list of rules. Leaves: the
sample with what the rules kept, or the name of the rule that dropped it. The rules are those of Qwen-VL's appendix on
data cleaning, whose thresholds are not published: every rule states its own. A rules file is YAML:

    rules:
      - {rule: aspect_ratio, max: 3.0}
      - {rule: text_length, min_chars: 5, max_chars: 500}
      - {rule: near_duplicates, max_distance: 3}

Rules run in the order given. `exact_duplicates` and `near_duplicates` compare samples with each other and therefore run
before all others, on the stream of items (`duplicates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from data_pipelines.errors import UserError
from data_pipelines.sources.clean_boxes import MinBoxSide, NestedBoxes
from data_pipelines.sources.clean_media import AspectRatio, PictureSize, Similarity
from data_pipelines.sources.clean_text import (
    Emoji,
    HtmlRemains,
    Languages,
    LongestCaption,
    OddPatterns,
    SpecialTags,
    TextLength,
)
from data_pipelines.sources.duplicates import ExactDuplicates, NearDuplicates
from data_pipelines.sources.item import Annotations
from data_pipelines.sources.sample import Sample


class Rule(Protocol):
    """One step: the sample as it goes on, or None where it is dropped. Rules are frozen dataclasses of settings."""

    def apply(self, sample: Sample) -> Sample | None:
        """What remains of `sample`."""
        ...


RULES: dict[str, type[Any]] = {
    "aspect_ratio": AspectRatio,
    "picture_size": PictureSize,
    "similarity": Similarity,
    "languages": Languages,
    "emoji": Emoji,
    "text_length": TextLength,
    "html_remains": HtmlRemains,
    "odd_patterns": OddPatterns,
    "special_tags": SpecialTags,
    "longest_caption": LongestCaption,
    "nested_boxes": NestedBoxes,
    "min_box_side": MinBoxSide,
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
}


Rules = Sequence[tuple[str, Any]]
DUPLICATE_RULES = ("exact_duplicates", "near_duplicates")


@dataclass(slots=True)
class RuleCount:
    """What a rule saw and left: samples, captions, boxes; `changed` captions were rewritten."""

    rule: str
    settings: dict[str, Any]
    samples_before: int = 0
    samples_after: int = 0
    captions_before: int = 0
    captions_after: int = 0
    changed: int = 0
    boxes_before: int = 0
    boxes_after: int = 0

    def add(self, other: RuleCount) -> None:
        """Add another process's counts of the same rule."""
        for field in fields(self):
            if field.name not in ("rule", "settings"):
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def read_rules(path: Path) -> Rules:
    """The rules of a YAML file as (name, rule) pairs.

    Raises:
        UserError: not YAML, an unknown rule or setting, a wrong type or value; each names what is known.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    listed = content.get("rules") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{path}: needs `rules:`, a list of {{rule: name, setting: value}}")
    return tuple(make_rule(f"{path}: rules[{i}]", entry) for i, entry in enumerate(listed))


def make_rule(where: str, entry: object) -> tuple[str, Any]:
    """One rule from its settings; `where` begins the message of an error."""
    if isinstance(entry, str):
        entry = {"rule": entry}
    if not isinstance(entry, dict) or entry.get("rule") not in RULES:
        named = entry.get("rule") if isinstance(entry, dict) else entry
        raise UserError(f"{where}: unknown rule {named!r}; known: {', '.join(RULES)}")
    name = entry["rule"]
    kind = RULES[name]
    types = get_type_hints(kind)
    settings: dict[str, Any] = {}
    for setting, value in entry.items():
        if setting == "rule":
            continue
        if setting not in types:
            raise UserError(f"{where}: {name} has no setting {setting!r}; it has {', '.join(types) or 'none'}")
        settings[setting] = _typed(f"{where}: {name}.{setting}", value, types[setting])
    return name, kind(**settings)


def _typed(where: str, value: object, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where} = {value!r}: needs {getattr(kind, '__name__', kind)}")


def new_counts(rules: Rules) -> list[RuleCount]:
    """Counts of zero for every rule."""
    return [RuleCount(name, asdict(rule)) for name, rule in rules]


def clean(sample: Sample, rules: Rules, counts: Sequence[RuleCount]) -> Sample | str:
    """The sample after all rules, or the name of the rule that dropped it. `counts` are those of `new_counts`.

    A rule that takes everything there was to learn drops the sample, too.
    """
    for (name, rule), count in zip(rules, counts, strict=True):
        if name in DUPLICATE_RULES:
            continue
        count.samples_before += 1
        count.captions_before += num_captions(sample.annotations)
        count.boxes_before += num_boxes(sample.annotations)
        after = rule.apply(sample)
        if after is None or after.annotations == Annotations():
            return name
        count.samples_after += 1
        count.captions_after += num_captions(after.annotations)
        count.boxes_after += num_boxes(after.annotations)
        known = {*sample.annotations.captions, *(grounded.caption for grounded in sample.annotations.grounded)}
        count.changed += len(set(after.annotations.captions) - known)
        sample = after
    return sample


def num_captions(annotations: Annotations) -> int:
    """Captions, grounded ones included."""
    return len(annotations.captions) + len(annotations.grounded)


def num_boxes(annotations: Annotations) -> int:
    """Boxes of objects, expressions, regions and grounded phrases."""
    labelled = (*annotations.objects, *annotations.referring, *annotations.regions)
    return sum(len(entry.boxes) for entry in labelled) + sum(
        len(boxes) for grounded in annotations.grounded for _, _, boxes in grounded.spans
    )
