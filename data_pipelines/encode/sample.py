"""One sample from record and bytes to an `Encoded` document; the counts promised by the plan come true here.

Enters: a validated `Record` and a way to read its media members. Leaves: token ids, labels, uint8 patches, and what had
to give (`LedgerEvent`s: "shrunk", "truncated"). Lengths are decided from headers by `encode.budget`, by the same call
the planner makes; a decoded image of another size than its header or index said is an error, never a quiet change of
the pack. Nothing is cut inside media: media shrinks, long plain text is shortened at its end; what still does not fit
is a BudgetError.

Cost: tokenising (about 0.1 ms for a caption), decoding, one resize, one copy into patches. The patches of a document
are never copied again before collation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.config import MediaConfig, Template
from data_pipelines.decode.clip_cache import ClipCache
from data_pipelines.decode.image import decode_image, probe_image
from data_pipelines.decode.members import media_kind
from data_pipelines.decode.video import ClipDecoder
from data_pipelines.encode.budget import plan_media
from data_pipelines.encode.chat import TokenizedText, is_truncatable, tokenize_prompt, tokenize_record
from data_pipelines.encode.patches import clip_to_patches, image_to_patches, resize_image
from data_pipelines.errors import MediaError, PlanMismatch
from data_pipelines.samples import (
    IGNORE_INDEX,
    Encoded,
    LedgerEvent,
    Media,
    MediaPlan,
    MediaRef,
    Record,
)
from data_pipelines.tokenizer import SpecialTokens, TextTokenizer

ReadMember = Callable[[str], bytes]


@dataclass(frozen=True)
class Counts:
    """What a sample will occupy: LLM tokens, those of text among them, ViT patches (4 per media token), media sizes."""

    num_tokens: int
    text_tokens: int
    num_patches: int
    plans: tuple[MediaPlan, ...]


class SampleEncoder:
    """Encodes the records of one stage: tokenizer, template, budgets, and a clip decoder once one is needed.

    It pickles without its decoder process, so it can be sent to `DataLoader` workers; `close` ends that process.
    `max_tokens` is the longest document allowed (LLM tokens of a pack). `vision_ids` writes "Picture 1: " before media.
    Decoded clips are kept in `clip_cache`, if there is one.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: Template,
        media_config: MediaConfig,
        max_tokens: int,
        vision_ids: bool = False,
        clip_cache: ClipCache | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template: Template = template
        self.media_config = media_config
        self.max_tokens = max_tokens
        self.vision_ids = vision_ids
        self._clip_cache = clip_cache
        self._clips: ClipDecoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_clips": None}

    def tokenize(self, record: Record, medias: Mapping[str, Media] | None = None) -> TokenizedText:
        """The record's tokens by this stage's template; media facts from `medias`, else from the record."""
        facts = record.media if medias is None else medias
        return tokenize_record(record, self.tokenizer, self.template, facts, self.vision_ids)

    def count(self, record: Record, medias: Mapping[str, Media] | None = None) -> Counts:
        """Tokens and patches the record will have, from headers alone; `encode` produces exactly these.

        Raises:
            BudgetError, MediaError, RecordError: as `encode`, for what can be known without pixels.
        """
        facts = record.media if medias is None else medias
        text, plans, _ = self._plan(record, self.tokenize(record, facts), facts)
        return Counts(
            num_tokens=text.text_tokens + sum(plan.num_tokens for plan in plans),
            text_tokens=text.text_tokens,
            num_patches=sum(plan.num_patches for plan in plans),
            plans=plans,
        )

    def encode(
        self,
        record: Record,
        read_member: ReadMember,
        dataset: int = 0,
        medias: Mapping[str, Media] | None = None,
    ) -> tuple[Encoded, list[LedgerEvent]]:
        """The document of `record`; `read_member(name)` returns a media member's bytes (called once per reference).

        `medias` overrides `record.media` as the facts the plan was made from; members in neither are probed. The events
        carry an empty `dataset` name: the caller, who knows it, fills it in.

        Raises:
            MediaError: missing, too large, damaged media; "size_mismatch" when pixels differ from the facts.
            BudgetError: the sample does not fit `max_tokens`.
            RecordError: parts and media do not belong together.
        """
        facts = self._facts(record, read_member, medias)
        text, plans, events = self._plan(record, self.tokenize(record, facts), facts)
        patches = tuple(
            self._patches(facts[ref.name], plan, read_member, record.key)
            for ref, plan in zip(text.media, plans, strict=True)
        )
        input_ids, labels = expand(text, plans, self.tokenizer.special)
        return Encoded(record.key, dataset, input_ids, labels, plans, patches), events

    def encode_prompt(
        self,
        record: Record,
        read_member: ReadMember,
        dataset: int = 0,
        medias: Mapping[str, Media] | None = None,
        reserve_tokens: int = 0,
    ) -> Encoded:
        """The record's prompt (everything before its last answer), for generation; no label is set.

        `reserve_tokens` are kept free for the answer when media is planned. Raises as `encode`.
        """
        facts = self._facts(record, read_member, medias)
        text = tokenize_prompt(record, self.tokenizer, self.template, facts, self.vision_ids)
        items = [(facts[ref.name], ref) for ref in text.media]
        plans = plan_media(items, text.text_tokens, self.media_config, self.max_tokens - reserve_tokens, record.key)
        patches = tuple(
            self._patches(media, plan, read_member, record.key) for (media, _), plan in zip(items, plans, strict=True)
        )
        input_ids, labels = expand(text, plans, self.tokenizer.special)
        return Encoded(record.key, dataset, input_ids, labels, plans, patches)

    def close(self) -> None:
        """End the decoder process, if one was started. The encoder can be used again afterwards."""
        if self._clips is not None:
            self._clips.close()
            self._clips = None

    def _clip_decoder(self) -> ClipDecoder:
        if self._clips is None:
            config = self.media_config
            self._clips = ClipDecoder(config.video_backend, config.decode_timeout_s, cache=self._clip_cache)
        return self._clips

    def _facts(
        self, record: Record, read_member: ReadMember, medias: Mapping[str, Media] | None
    ) -> Mapping[str, Media]:
        """Facts of every member the record names: given ones, else the record's, else probed from the bytes."""
        facts = dict(record.media)
        facts.update(medias or {})
        for message in record.messages:
            for part in message.parts:
                if isinstance(part, MediaRef) and part.name not in facts:
                    is_clip = (part.kind or media_kind(part.name)) == "video"
                    probe = self._clip_decoder().probe if is_clip else probe_image
                    facts[part.name] = probe(read_member(part.name), part.name, record.key)
        return facts

    def _plan(
        self, record: Record, text: TokenizedText, facts: Mapping[str, Media]
    ) -> tuple[TokenizedText, tuple[MediaPlan, ...], list[LedgerEvent]]:
        events = []
        full = len(text.input_ids)
        if full > self.max_tokens and is_truncatable(record):
            text = replace(
                text, input_ids=text.input_ids[: self.max_tokens], supervised=text.supervised[: self.max_tokens]
            )
            message = f"text of {full} tokens shortened to max_tokens={self.max_tokens}"
            events.append(LedgerEvent("", record.key, "truncated", message))
        items = [(facts[ref.name], ref) for ref in text.media]
        plans = plan_media(items, text.text_tokens, self.media_config, self.max_tokens, record.key)
        for (media, _), plan in zip(items, plans, strict=True):
            if plan.shrunk:
                message = (
                    f"{media.name}: {plan.num_frames} frames of {plan.width} x {plan.height} pixels "
                    f"({plan.num_tokens} tokens), so that the sample fits"
                )
                events.append(LedgerEvent("", record.key, "shrunk", message))
        return text, plans, events

    def _patches(self, media: Media, plan: MediaPlan, read_member: ReadMember, key: str) -> Tensor:
        data = read_member(media.name)
        config = self.media_config
        if len(data) > config.max_source_bytes:
            raise MediaError(
                key,
                "too_many_bytes",
                f"{media.name} has {len(data)} bytes, over max_source_bytes={config.max_source_bytes}",
            )
        if plan.kind == "video":
            if media.width * media.height > config.max_source_pixels:
                raise MediaError(
                    key,
                    "too_many_pixels",
                    f"{media.name}: frames of {media.width} x {media.height} pixels, over "
                    f"max_source_pixels={config.max_source_pixels}",
                )
            return clip_to_patches(self._clip_decoder().read(data, media, plan, key))
        rgb = decode_image(data, key, config.max_source_pixels)
        if rgb.shape[:2] != (media.height, media.width):
            raise MediaError(
                key,
                "size_mismatch",
                f"{media.name} decodes to {rgb.shape[1]} x {rgb.shape[0]} pixels, the index or record says "
                f"{media.width} x {media.height}; rebuild the index, or correct the record's media facts",
            )
        return image_to_patches(resize_image(rgb, plan.height, plan.width))


def expand(text: TokenizedText, plans: tuple[MediaPlan, ...], special: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Ids and labels of the document, int64 [n] each: every media item's single pad becomes `plan.num_tokens` pads.

    >>> # ids [VS, PAD, VE, a, b] with 4 tokens of media → [VS, PAD, PAD, PAD, PAD, VE, a, b]
    """
    ids = np.array(text.input_ids, dtype=np.int64)
    learnt = np.array(text.supervised, dtype=bool)
    if plans:
        pads = np.flatnonzero((ids == special.image_pad) | (ids == special.video_pad))
        if len(pads) != len(plans):
            raise PlanMismatch(f"{len(pads)} media tokens for {len(plans)} plans: {plans}")
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[pads] = [plan.num_tokens for plan in plans]
        ids, learnt = np.repeat(ids, repeats), np.repeat(learnt, repeats)
    labels = np.where(learnt, ids, IGNORE_INDEX)
    return torch.from_numpy(ids), torch.from_numpy(labels)
