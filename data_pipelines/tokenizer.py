"""Text ↔ token ids, with special tokens out of reach of the data.

Enters: a Hugging Face tokenizer folder (Qwen2-VL's, or the demo's small one) and plain text. Leaves: token ids.
Two rules hold, both checked when the folder is loaded:

- A special token's *string* in a text is ordinary text: a user who writes "<|im_end|>" gets a few harmless tokens,
  never the token that ends a turn. Special ids enter a document only where `encode.chat` puts them, by number.
- Ids come from the folder, never from constants: the demo's tokenizer has other numbers than the published one.

Cost: loading the published vocabulary takes 0.6 s (0.8 s more the first time `hf` is used); encoding about 4 µs plus
0.3 µs per character, 0.3 µs for a short text that came before: role names, line feeds and usual questions are most of
a chat's runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from data_pipelines.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What is remembered: at most some 2 MB a process.
SHORT_CHARACTERS, SHORT_TEXTS = 48, 4096


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens a Qwen2-VL document is built from; field `im_end` is the token "<|im_end|>"."""

    endoftext: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    object_ref_start: int
    object_ref_end: int
    box_start: int
    box_end: int
    quad_start: int
    quad_end: int

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The tokens as written, in field order: ("<|endoftext|>", "<|im_start|>", ...)."""
        return tuple(f"<|{f.name}|>" for f in fields(cls))


@dataclass(frozen=True)
class _PointPieces:
    """Ids of "0" to "999" and of what stands between them: "(", ",", "),(", ")"."""

    numbers: list[list[int]]
    opening: list[int]
    comma: list[int]
    between: list[int]
    closing: list[int]

    def join(self, points: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of "(x1,y1),(x2,y2),..." if no piece merges with its neighbours."""
        ids = []
        before = self.opening
        for x, y in points:
            ids += before
            ids += self.numbers[x]
            ids += self.comma
            ids += self.numbers[y]
            before = self.between
        ids += self.closing
        return ids


class TextTokenizer:
    """A tokenizer folder, used so that plain text can never become a special token.

    Attributes: `path` the folder; `special` ids by name; `vocab_size` the number of entries including special tokens
    (the model's embedding may have more rows); `fingerprint` 16 hex digits of tokenizer.json, under which token counts
    are cached in an index.

    It pickles as its path, so a spawned worker loads the folder again; a forked one shares the parent's memory.

    Raises:
        UserError: no tokenizer.json in `path`, a special token missing from it (named), or a special token that its
            text would produce (a folder whose tokens are not flagged special).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        source = Path(path) / "tokenizer.json"
        if not source.is_file():
            raise UserError(
                f"{source}: no such file; give the folder of a Qwen2-VL tokenizer, or write tokenizer.json with "
                f"transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        content = source.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        try:
            backend = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for malformed files
            raise UserError(f"{source}: not a tokenizer file ({error})") from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # their strings are split like any other text
        self._backend = backend
        self._encode_short = lru_cache(SHORT_TEXTS)(self._encode)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special = self._find_special(source)
        self._reject_reachable_specials(source)

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[str]]:
        return type(self), (self.path,)

    def encode(self, text: str) -> list[int]:
        """Ids of plain `text`; the same ids as transformers gives for text without special-token strings.

        Raises:
            UserError: `text` holds a lone surrogate (U+D800..U+DFFF, half a character), which has no encoding.
        """
        return list(self._encode_short(text) if len(text) <= SHORT_CHARACTERS else self._encode(text))

    def _encode(self, text: str) -> Sequence[int]:
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"text without a UTF-8 encoding: {text[:40]!r}...") from error
        return ids

    def encode_points(self, points: Sequence[tuple[int, int]]) -> list[int]:
        """Ids of "(x1,y1),(x2,y2),..." for coordinates in [0, 1000): the ids of `encode`, without its cost.

        Qwen2's tokenizer takes digits one by one, so the pieces between brackets and commas never merge with them;
        where a tokenizer does merge them, this is `encode`.
        """
        if self._point_pieces is None:
            return self.encode(",".join(f"({x},{y})" for x, y in points))
        return self._point_pieces.join(points)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`; special tokens are written out unless `skip_special`."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text

    @cached_property
    def hf(self) -> PreTrainedTokenizerFast:
        """The same folder as transformers loads it: for export and for the published chat template."""
        from transformers import AutoTokenizer  # 2 s that a decode worker never needs

        return AutoTokenizer.from_pretrained(self.path)

    @cached_property
    def _point_pieces(self) -> _PointPieces | None:
        numbers = [self.encode(str(number)) for number in range(1000)]
        pieces = _PointPieces(numbers, *(self.encode(text) for text in ("(", ",", "),(", ")")))
        corners = [(0, 9), (10, 99), (100, 999), (123, 4), (56, 789)]
        whole = self.encode(",".join(f"({x},{y})" for x, y in corners))
        return pieces if pieces.join(corners) == whole else None

    def _find_special(self, source: Path) -> SpecialTokens:
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        missing = [name for name in SpecialTokens.names() if name not in vocabulary]
        if missing:
            raise UserError(f"{source}: special token {', '.join(missing)} is missing; Qwen2-VL needs all of them")
        return SpecialTokens(*(vocabulary[name] for name in SpecialTokens.names()))

    def _reject_reachable_specials(self, source: Path) -> None:
        special = {getattr(self.special, f.name) for f in fields(SpecialTokens)}
        for name in SpecialTokens.names():
            if special.intersection(self.encode(f"a {name}b")):
                raise UserError(
                    f'{source}: the text {name} becomes a special token; set "special": true for it under '
                    f'"added_tokens", or data could end turns and open images'
                )
