"""What travels along the data way: Record → Encoded → PackedBatch.

A shard member set is decoded into a `Record` (validated, still in words and pixels of the source), encoded into an
`Encoded` (token ids, supervision, uint8 patches), and several of those are collated into one `PackedBatch`.

Legend of shapes: T tokens of a pack, D documents, M media items, P patches (P_i of still images, P_v of clips, where
one row of a clip holds two frames), L supervised positions, S segments of ViT attention (one temporal step each).
A patch is 14 x 14 pixels; 2 x 2 patches make one LLM token; so P = 4 * (media tokens).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100
PATCH_SIZE = 14
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2

MediaKind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Media:
    """Facts of one stored image or clip, read from its header; never from decoded pixels.

    `width` and `height` are pixels as displayed (EXIF orientation and rotation metadata applied).
    `frames`, `fps` and `duration_s` describe a clip; a still image has 1, 0.0, 0.0.
    """

    name: str
    kind: MediaKind
    width: int
    height: int
    frames: int = 1
    fps: float = 0.0
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. `supervised=False` inside an assistant turn marks text that is not to be learnt (tool results)."""

    text: str
    supervised: bool = True


@dataclass(frozen=True, slots=True)
class MediaRef:
    """The place of a media member in a message, with optional per-part budgets (pixels, frames per second, frames).

    `kind` is what the message calls it ("video" for a GIF that is to be read as a clip); None: by the extension.
    """

    name: str
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    nframes: int | None = None
    kind: MediaKind | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """A phrase, its boxes or quads, or both; coordinates are pixels of the stored media `name` (as displayed).

    `phrase` None writes the coordinates alone (the answer of a referring question); no boxes and no quads writes the
    phrase alone (its question). A box is (x1, y1, x2, y2), a quad four corners (x1, y1, ..., x4, y4) clockwise.
    """

    name: str
    phrase: str | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    quads: tuple[tuple[float, float, float, float, float, float, float, float], ...] = ()
    supervised: bool = True


Part = Text | MediaRef | Region


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One validated sample. `key` is unique in its shard; `task` names its kind ("caption", "referring", "chat", ...).

    A document to be learnt whole (plain or interleaved text) is a single assistant message.
    """

    key: str
    task: str
    messages: tuple[Message, ...]
    media: dict[str, Media] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MediaPlan:
    """What a media item becomes, decided from its `Media` and budgets before any decoding.

    `grid_thw` counts patches: (temporal steps, rows, columns); rows and columns are even. `num_frames` is 1 for a still
    image and 2 * t for a clip. `height` and `width` are the resized pixels: 14 * rows, 14 * columns.
    `shrunk` tells that the media got fewer pixels or frames than its own limits allow because the sample had to fit.
    """

    kind: MediaKind
    grid_thw: tuple[int, int, int]
    num_frames: int
    shrunk: bool = False

    @property
    def height(self) -> int:
        """Pixels from top to bottom of one resized frame."""
        return self.grid_thw[1] * PATCH_SIZE

    @property
    def width(self) -> int:
        """Pixels from left to right of one resized frame."""
        return self.grid_thw[2] * PATCH_SIZE

    @property
    def num_patches(self) -> int:
        """ViT patches of all temporal steps."""
        t, h, w = self.grid_thw
        return t * h * w

    @property
    def num_tokens(self) -> int:
        """LLM tokens: a quarter of the patches."""
        return self.num_patches // (MERGE_SIZE * MERGE_SIZE)


@dataclass(slots=True)
class Encoded:
    """One document, ready to be packed.

    `input_ids` int64 [n] (media as runs of the pad token), `labels` int64 [n] aligned with `input_ids` (the token
    itself where it is supervised, -100 elsewhere; the first is always -100), `media` the plans in order of appearance,
    `patches` one uint8 tensor per media item: [P, 588] for a still image, [P, 1176] for a clip, in the ViT's order.
    """

    key: str
    dataset: int
    input_ids: Tensor
    labels: Tensor
    media: tuple[MediaPlan, ...]
    patches: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class LedgerEvent:
    """Something the user should know of one sample: dropped, shrunk, truncated. `dataset` is the source's name.

    `indexed`: known from the index, and told at once for all samples of a shard or block that comes into use.
    `num_samples`: how many it stands for, where a shard has too many of a kind to name each.
    """

    dataset: str
    key: str
    reason: str
    message: str
    indexed: bool = False
    num_samples: int = 1


@dataclass(slots=True)
class PackedBatch:
    """One pack: documents end to end, no batch dimension, no padding; all the model needs, computed in the worker.

    input_ids          int64 [T]
    labels             int64 [T], aligned with input_ids, -100 where unsupervised
    position_ids       int64 [3, T], (t, h, w), restarting at 0 in each document
    cu_seqlens         int32 [D + 1], document borders; max_seqlen the longest document
    image_patches      uint8 [P_i, 588]: (channel, row, column)
    video_patches      uint8 [P_v, 1176]: (channel, 2 frames, row, column)
    grid_thw           int32 [M, 3] in the ViT's order: all still images first, then all clips
    vision_cu_seqlens  int32 [S + 1] over the patches in the ViT's order; vision_max_seqlen the longest segment
    patch_positions    int32 [P, 2], (row, column) of each patch in the ViT's order, for 2D-RoPE
    vision_index       int64 [P / 4]: the row of input_ids that each merged feature replaces; empty with a dummy image
    loss_index         int64 [L]: positions whose next token is supervised; loss_targets int64 [L]: those next tokens
    loss_datasets      int64 [L]: the dataset id of each
    A pack without media carries a dummy still image of 4 patches (`dummy_vision`): every rank runs the ViT.
    A pack may have lost all its samples (T = 0 is replaced by one unsupervised pad token): a legal batch.
    """

    number: int
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    image_patches: Tensor
    video_patches: Tensor
    grid_thw: Tensor
    vision_cu_seqlens: Tensor
    vision_max_seqlen: int
    patch_positions: Tensor
    vision_index: Tensor
    loss_index: Tensor
    loss_targets: Tensor
    loss_datasets: Tensor
    dummy_vision: bool
    max_tokens: int
    keys: tuple[str, ...]
    datasets: tuple[int, ...]
    events: tuple[LedgerEvent, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack (LLM positions), T."""
        return int(self.input_ids.shape[0])

    @property
    def num_supervised(self) -> int:
        """Supervised tokens, L."""
        return int(self.loss_index.shape[0])

    def to(self, device: torch.device, non_blocking: bool = True) -> PackedBatch:
        """The same pack with every tensor on `device`; pinned host tensors copy asynchronously."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The same pack in page-locked memory (called by DataLoader)."""
        pinned: dict[str, Any] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)
