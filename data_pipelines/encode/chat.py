r"""Record → token ids and supervision mask, by one of two templates.

Enters: a validated `Record`, the sizes of its media, a tokenizer. Leaves: ids with ONE pad token per media item (its
run is filled in by `encode.sample`), a mask of what is learnt, and the media in document order.

Template "chatml" (stage 3) is the chat template published with Qwen2-VL, character for character, default system turn
included. Learnt: the content of assistant turns and the <|im_end|> that closes them, unless the answer's end is not
learnt (`supervised=False`, as after a tool's result): "result -> end" is nothing that a model should say.

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n
    <|vision_start|><|image_pad|><|vision_end|>Question<|im_end|>\n<|im_start|>assistant\n[Answer<|im_end|>]\n

Template "plain" (stages 1 and 2) is Qwen-VL's pretraining form with Qwen2-VL's tags (papers' section on multi-task
pretraining); further turns follow in the same document. Learnt: assistant text and the <|endoftext|> that closes it.

    <|vision_start|><|image_pad|><|vision_end|>Generate the caption in English:\n[A dog.<|endoftext|>]

Its separator is one newline after a turn that ends in text: it belongs to the prompt, so the prompt is the same
whatever answer follows, and no answer starts with a stray space. A turn that ends in an image or in a region (as in
referring: phrase -> box) has none, nor has one whose text already ends in white space. System turns are unsupervised.

A document that is one assistant message (plain or interleaved text) is learnt whole, but for its first token, which
nothing predicts. Media tokens are never learnt, nor parts with `supervised=False` (tool results).

Text is tokenised in runs between special tokens, as transformers tokenises the whole string, with one cut more:
wherever supervision begins or ends inside a run ("assistant\n" | answer), so that training sees the same ids as
generation, where the prompt is tokenised without its answer. No text can make a special token or move the mask.

Region parts become <|object_ref_start|>phrase<|object_ref_end|>, then <|box_start|>(x1,y1),(x2,y2)<|box_end|> per box
and <|quad_start|>(x1,y1),(x2,y2),(x3,y3),(x4,y4)<|quad_end|> per quad, on the grid of `encode.boxes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.config import Template
from data_pipelines.encode.boxes import GridPoints, box_points, box_text, quad_points, quad_text
from data_pipelines.errors import RecordError
from data_pipelines.samples import Media, MediaRef, Message, Part, Record, Region, Text
from data_pipelines.tokenizer import TextTokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class TokenizedText:
    """A document before its media: `input_ids` with one pad token per media item, `supervised` aligned with it.

    `media` are the references in order of their pad tokens. Text tokens of the document: len(input_ids) - len(media).
    """

    input_ids: list[int]
    supervised: list[bool]
    media: tuple[MediaRef, ...]

    @property
    def text_tokens(self) -> int:
        """Tokens besides the media's own (vision tags count as text)."""
        return len(self.input_ids) - len(self.media)


def tokenize_record(
    record: Record,
    tokenizer: TextTokenizer,
    template: Template,
    medias: Mapping[str, Media],
    vision_ids: bool = False,
) -> TokenizedText:
    """The whole document. `medias` gives kind and size of every member the record names.

    `vision_ids` writes "Picture 1: ", "Video 1: " before each item, as the chat template's `add_vision_id`.

    Raises:
        RecordError: a part names a member that `medias` lacks ("unknown_media"), or text has no encoding ("bad_text").
    """
    writer = _Writer(record, tokenizer, medias, vision_ids)
    if template == "chatml":
        _write_chatml(writer, record.messages)
    else:
        _write_plain(writer, record.messages)
    return writer.finish()


def tokenize_prompt(
    record: Record,
    tokenizer: TextTokenizer,
    template: Template,
    medias: Mapping[str, Media],
    vision_ids: bool = False,
) -> TokenizedText:
    """Everything before the last assistant turn, plus what makes the model answer; for evaluation. Nothing supervised.

    The ids are the beginning of `tokenize_record`'s: a chatml prompt ends in <|im_start|>assistant and a newline, a
    plain one in the separator.

    Raises:
        RecordError: as `tokenize_record`; or nothing stands before the answer ("no_prompt").
    """
    last = max((i for i, message in enumerate(record.messages) if message.role == "assistant"), default=None)
    before = record.messages if last is None else record.messages[:last]
    if not before:
        raise RecordError(record.key, "no_prompt", "nothing stands before the answer: the record is learnt whole")
    writer = _Writer(record, tokenizer, medias, vision_ids)
    if template == "chatml":
        _write_chatml(writer, before)
        writer.special(writer.ids.im_start, False)
        writer.text("assistant\n", False)
    else:
        _write_plain(writer, before)
    prompt = writer.finish()
    return replace(prompt, supervised=[False] * len(prompt.input_ids))


def chat_messages(record: Record, medias: Mapping[str, Media]) -> list[dict[str, Any]]:
    """The record as transformers' `apply_chat_template` takes it, regions written out as text.

    For inspection and for other inference engines; training never goes through strings, where text could make tags.
    """

    def content(part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        if isinstance(part, MediaRef):
            kind = _find_media(record, part.name, medias).kind
            return {"type": kind, kind: part.name}
        return {"type": "text", "text": _region_string(part, _find_media(record, part.name, medias))}

    return [{"role": message.role, "content": [content(part) for part in message.parts]} for message in record.messages]


def is_truncatable(record: Record) -> bool:
    """Whether the record may be shortened at its end to fit: one assistant message of nothing but text."""
    return (
        len(record.messages) == 1
        and record.messages[0].role == "assistant"
        and all(isinstance(part, Text) for part in record.messages[0].parts)
    )


def _write_chatml(writer: _Writer, messages: Iterable[Message]) -> None:
    ids = writer.ids
    for number, message in enumerate(messages):
        if number == 0 and message.role != "system":
            writer.special(ids.im_start, False)
            writer.text(f"system\n{DEFAULT_SYSTEM}", False)
            writer.special(ids.im_end, False)
            writer.text("\n", False)
        learnt = message.role == "assistant"
        writer.special(ids.im_start, False)
        writer.text(f"{message.role}\n", False)
        if learnt:
            writer.cut()
        writer.parts(message.parts, learnt)
        writer.special(ids.im_end, learnt and _teaches_its_end(message))
        writer.text("\n", False)


def _write_plain(writer: _Writer, messages: Iterable[Message]) -> None:
    for message in messages:
        if message.role == "assistant":
            writer.cut()
            writer.parts(message.parts, True)
            writer.special(writer.ids.endoftext, _teaches_its_end(message))
        else:
            writer.parts(message.parts, False)
            if _needs_separator(message):
                writer.text("\n", False)


def _teaches_its_end(message: Message) -> bool:
    """Whether the token that closes an answer is learnt: as the last words before it (media have no say)."""
    return next((part.supervised for part in reversed(message.parts) if not isinstance(part, MediaRef)), True)


def _needs_separator(message: Message) -> bool:
    last = message.parts[-1] if message.parts else None
    return isinstance(last, Text) and last.text != "" and not last.text[-1].isspace()


class _Writer:
    """Collects a document: text in runs, special tokens by number. One per document."""

    def __init__(self, record: Record, tokenizer: TextTokenizer, medias: Mapping[str, Media], vision_ids: bool) -> None:
        self.ids = tokenizer.special
        self._record = record
        self._tokenizer = tokenizer
        self._medias = medias
        self._vision_ids = vision_ids
        self._seen = {"image": 0, "video": 0}
        self._input_ids: list[int] = []
        self._supervised: list[bool] = []
        self._media: list[MediaRef] = []
        self._run: list[str] = []
        self._run_supervised = False

    def text(self, text: str, supervised: bool) -> None:
        """Append plain text; it joins the run before it if both are supervised alike."""
        if supervised != self._run_supervised:
            self.cut()
            self._run_supervised = supervised
        self._run.append(text)

    def special(self, token: int, supervised: bool) -> None:
        """Append one special token by its id."""
        self.cut()
        self._input_ids.append(token)
        self._supervised.append(supervised)

    def cut(self) -> None:
        """End the current run of text: what follows is tokenised on its own."""
        text = "".join(self._run)
        self._run.clear()
        if not text:
            return
        try:
            ids = self._tokenizer.encode(text)
        except ValueError as error:
            raise RecordError(self._record.key, "bad_text", str(error)) from error
        self._input_ids += ids
        self._supervised += [self._run_supervised] * len(ids)

    def parts(self, parts: Iterable[Part], learnt: bool) -> None:
        """Append a turn's content; `learnt` says whether it is an assistant's."""
        for part in parts:
            if isinstance(part, Text):
                self.text(part.text, learnt and part.supervised)
            elif isinstance(part, MediaRef):
                self._media_item(part)
            else:
                self._region(part, learnt and part.supervised)

    def finish(self) -> TokenizedText:
        """The document; its first token is never supervised, since nothing predicts it."""
        self.cut()
        if self._supervised:
            self._supervised[0] = False
        return TokenizedText(self._input_ids, self._supervised, tuple(self._media))

    def _media_item(self, ref: MediaRef) -> None:
        kind = _find_media(self._record, ref.name, self._medias).kind
        if self._vision_ids:
            self._seen[kind] += 1
            self.text(f"{'Picture' if kind == 'image' else 'Video'} {self._seen[kind]}: ", False)
        self.special(self.ids.vision_start, False)
        self.special(self.ids.image_pad if kind == "image" else self.ids.video_pad, False)
        self.special(self.ids.vision_end, False)
        self._media.append(ref)

    def _region(self, region: Region, supervised: bool) -> None:
        media = _find_media(self._record, region.name, self._medias)
        ids = self.ids
        if region.phrase is not None:
            self.special(ids.object_ref_start, supervised)
            self.text(region.phrase, supervised)
            self.special(ids.object_ref_end, supervised)
        for box in region.boxes:
            self._points(ids.box_start, box_points(box, media.width, media.height), ids.box_end, supervised)
        for quad in region.quads:
            self._points(ids.quad_start, quad_points(quad, media.width, media.height), ids.quad_end, supervised)

    def _points(self, start: int, points: GridPoints, end: int, supervised: bool) -> None:
        self.special(start, supervised)
        ids = self._tokenizer.encode_points(points)
        ids.append(end)
        self._input_ids += ids
        self._supervised += [supervised] * len(ids)


def _region_string(region: Region, media: Media) -> str:
    parts = [] if region.phrase is None else [f"<|object_ref_start|>{region.phrase}<|object_ref_end|>"]
    parts += [f"<|box_start|>{box_text(box, media.width, media.height)}<|box_end|>" for box in region.boxes]
    parts += [f"<|quad_start|>{quad_text(quad, media.width, media.height)}<|quad_end|>" for quad in region.quads]
    return "".join(parts)


def _find_media(record: Record, name: str, medias: Mapping[str, Media]) -> Media:
    media = medias.get(name)
    if media is None:
        raise RecordError(
            record.key, "unknown_media", f"a part names {name!r}, the sample has {sorted(medias) or 'no media'}"
        )
    return media
