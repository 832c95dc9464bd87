"""Rules on captions: what they are written in, how long they are, what the web left in them.

A rule drops captions or rewrites them; other texts (answers, OCR lines, chats) are left alone, because there a tag or a
file name may be the right answer. A grounded caption cannot be rewritten, since its phrases are placed by character:
where a rule would change it, it is dropped.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from data_pipelines.errors import UserError
from data_pipelines.sources.sample import Sample

_TAG = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-zA-Z][^<>]*>", re.DOTALL | re.IGNORECASE)
_SPACES = re.compile(r"\s+")
# Pictographs, symbols used as emoji, flags, skin tones, keycaps and the selector that makes a symbol an emoji.
_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\U00002600-\U000027bf\U00002b00-\U00002bff\U0000fe0f\U000020e3\U0001f1e6-\U0001f1ff\U000e0020-\U000e007f]"
)
_SPECIAL_TAG = re.compile(r"<[A-Z_]{2,}>|<\|[^|<>]*\|>|\[(?:UNK|PAD|MASK|CLS|SEP)\]")
_SCRIPTS = {"english": ("LATIN",), "chinese": ("CJK",)}
_ODD = (
    (re.compile(r"(?i)\b(?:https?://|www\.)\S+"), ""),
    (re.compile(r"(?i)\S+@\S+\.[a-z]{2,}"), ""),
    (re.compile(r"(?i)\b[\w\-]+\.(?:jpe?g|png|gif|bmp|webp|tiff?|pdf|mp4)\b"), ""),
    (re.compile(r"(?i)\b(?:img|dsc[nf]?|p|pic|image|photo|screenshot)[_\-]?\d{3,}\b"), ""),
    (re.compile(r"#\w+"), ""),
    (re.compile(r"([!?.,;:~\-_=*#|/\\])\1{2,}"), r"\1"),
    (re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f]"), ""),
)


def _rewrite(sample: Sample, change: Callable[[str], str]) -> Sample:
    """Captions through `change`; blank ones and grounded ones that would change are dropped."""
    told = (change(caption) for caption in sample.annotations.captions)
    return sample.having(
        captions=tuple(caption for caption in told if caption),
        grounded=tuple(entry for entry in sample.annotations.grounded if change(entry.caption) == entry.caption),
    )


def _keep(sample: Sample, good: Callable[[str], bool]) -> Sample:
    """The captions, grounded or not, that are `good`."""
    return sample.having(
        captions=tuple(caption for caption in sample.annotations.captions if good(caption)),
        grounded=tuple(entry for entry in sample.annotations.grounded if good(entry.caption)),
    )


@dataclass(frozen=True)
class Languages:
    """Drop captions with letters of other scripts than those of `allowed` ("english", "chinese").

    Accented Latin letters are English only if `accents` (café); digits, punctuation and symbols belong to all.
    """

    allowed: tuple[str, ...] = ("english", "chinese")
    accents: bool = True

    def __post_init__(self) -> None:
        for name in self.allowed:
            if name not in _SCRIPTS:
                raise UserError(f"languages.allowed = {name!r}: known are {', '.join(_SCRIPTS)}")

    def apply(self, sample: Sample) -> Sample | None:
        """The sample without captions in other scripts."""
        scripts = tuple(script for name in self.allowed for script in _SCRIPTS[name])

        def good(caption: str) -> bool:
            return all(self._belongs(letter, scripts) for letter in set(caption) if letter.isalpha())

        return _keep(sample, good)

    def _belongs(self, letter: str, scripts: tuple[str, ...]) -> bool:
        if letter.isascii():
            return "LATIN" in scripts
        name = unicodedata.name(letter, "")
        return name.startswith(scripts) and (self.accents or not name.startswith("LATIN"))


@dataclass(frozen=True)
class Emoji:
    """Drop captions with emoji."""

    def apply(self, sample: Sample) -> Sample | None:
        """The sample without such captions."""
        return _keep(sample, lambda caption: not _EMOJI.search(caption))


@dataclass(frozen=True)
class TextLength:
    """Drop captions of fewer than `min_chars` or more than `max_chars` characters, or fewer than `min_words` words.

    A Chinese character counts as a word.
    """

    min_chars: int = 5
    max_chars: int = 1000
    min_words: int = 0

    def __post_init__(self) -> None:
        if self.min_chars > self.max_chars:
            raise UserError(f"text_length: min_chars {self.min_chars} is more than max_chars {self.max_chars}")

    def apply(self, sample: Sample) -> Sample | None:
        """The sample without captions too short or too long."""

        def good(caption: str) -> bool:
            words = len(re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", caption))
            return self.min_chars <= len(caption) <= self.max_chars and words >= self.min_words

        return _keep(sample, good)


@dataclass(frozen=True)
class HtmlRemains:
    """Take HTML out of captions: tags and comments go, entities become their characters, white space is one space."""

    def apply(self, sample: Sample) -> Sample | None:
        """The sample with such captions rewritten."""
        return _rewrite(sample, self._strip)

    def _strip(self, caption: str) -> str:
        if not re.search(r"[<&]", caption):
            return caption
        return _SPACES.sub(" ", html.unescape(_TAG.sub(" ", caption))).strip()


@dataclass(frozen=True)
class OddPatterns:
    """Take out of captions what is no description: links, addresses, file and camera names, hashtags, repeated marks.

    `extra` are further regular expressions whose matches are removed.
    """

    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.extra:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"odd_patterns.extra = {pattern!r}: no regular expression ({error})") from error

    def apply(self, sample: Sample) -> Sample | None:
        """The sample with such captions rewritten."""
        return _rewrite(sample, self._strip)

    def _strip(self, caption: str) -> str:
        told = caption
        for pattern, instead in (*_ODD, *((re.compile(extra), "") for extra in self.extra)):
            told = pattern.sub(instead, told)
        return caption if told == caption else _SPACES.sub(" ", told).strip()


@dataclass(frozen=True)
class SpecialTags:
    """Drop captions with placeholders such as <PERSON> (CC12M), [UNK], or special-token strings."""

    def apply(self, sample: Sample) -> Sample | None:
        """The sample without such captions."""
        return _keep(sample, lambda caption: not _SPECIAL_TAG.search(caption))


@dataclass(frozen=True)
class LongestCaption:
    """Keep only the longest of several captions (the first of equals)."""

    def apply(self, sample: Sample) -> Sample | None:
        """The sample with at most one caption."""
        captions = sample.annotations.captions
        return sample if len(captions) < 2 else sample.having(captions=(max(captions, key=len),))
