"""Qwen2-VL: a packed batch in, the summed loss out.

Enters: one `PackedBatch` (documents end to end, no padding). Leaves: the loss over its supervised tokens. Logits exist
only at those positions. Parameter names are those of the published checkpoints (`visual.*`, `model.*`, `lm_head.*`).
Every call runs the same submodules in the same order, with or without media, supervised tokens or gradients, because
under ZeRO-3 each of them is a collective; each parameter is read inside the forward pass of the module that owns it or,
for the output matrix, of the model as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipelines.pack.slice import PackSlice
from data_pipelines.samples import PackedBatch
from qwen2vl_train.model.attention import Backend, Segments, make_segments, resolve_backend
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.head import LossOutput, linear_cross_entropy
from qwen2vl_train.model.language import Decoder, LayerCache
from qwen2vl_train.model.sharing import Exchange, Sharing
from qwen2vl_train.model.vision import Patches, VisionTransformer


@dataclass(frozen=True)
class LogitsRequest:
    """Ask for logits in place of the loss (generation, evaluation).

    `inputs` is a pack, or, to continue documents by one token each, their new tokens: int64 [D].
    For new tokens `position_ids` int [3, D] is needed. `rows` int64 [n] are the positions whose logits are wanted.
    `caches`, one per layer, take in keys and values; None computes without a cache.
    """

    inputs: PackedBatch | Tensor
    rows: Tensor
    position_ids: Tensor | None = None
    caches: list[LayerCache] | None = None


class LanguageHead(nn.Module):
    """Holds `lm_head.weight` [V, D] where it is not tied to the embeddings."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))


class Qwen2VL(nn.Module):
    """The whole model. `*_checkpointing` n recomputes every n-th block in the backward pass (0: none, 1: every block).

    `exchange` joins the ranks that share a pack: with it, `forward` takes a `PackSlice`, too, for its own loss.
    Weights are uninitialised until `weights.initialise` or a loader fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: Backend = "auto",
        vision_checkpointing: int = 0,
        text_checkpointing: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.exchange = exchange
        self.attention: Backend = attention
        self.visual = VisionTransformer(config.vision, config.text.hidden_size, vision_checkpointing)
        self.model = Decoder(config.text, text_checkpointing)
        if not config.tie_word_embeddings:
            self.lm_head = LanguageHead(config.text.vocab_size, config.text.hidden_size)

    @overload
    def forward(self, batch: PackedBatch) -> LossOutput: ...

    @overload
    def forward(self, batch: LogitsRequest) -> Tensor: ...

    def forward(self, batch: PackedBatch | LogitsRequest) -> LossOutput | Tensor:
        """The loss of a pack; or, for a LogitsRequest, float32 logits [n, V] at its rows."""
        if isinstance(batch, PackedBatch):
            hidden = self._read(batch, None).index_select(0, batch.loss_index)
            return linear_cross_entropy(hidden, self._output_weight(), batch.loss_targets)
        if isinstance(batch.inputs, PackedBatch):
            hidden = self._read(batch.inputs, batch.caches)
        else:
            hidden = self._continue(batch)
        return F.linear(hidden[batch.rows], self._output_weight()).float()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the inner function of every ViT and decoder block for any length.

        Under ZeRO-3 make each block a leaf module (`set_z3_leaf_modules`): the weights are then gathered around the
        block and no hook breaks its graph. The reference attention stays outside, since it loops over documents.
        """
        for block in (*self.visual.blocks, *self.model.layers):
            block.inner = torch.compile(block.inner, backend=backend, dynamic=True)

    def _read(self, batch: PackedBatch, caches: list[LayerCache] | None) -> Tensor:
        embeddings = self.model.embed_tokens(batch.input_ids)
        backend = resolve_backend(self.attention, embeddings.device, embeddings.dtype)
        features = self.visual(self._patches(batch, backend))
        sharing = self._sharing(batch)
        if batch.dummy_vision:
            # no media here, yet every rank runs the ViT; nothing of the dummy image reaches the decoder
            embeddings = embeddings + 0.0 * features.sum()
        else:
            if sharing is not None:
                features = sharing.deliver(features)
            embeddings = embeddings.index_copy(0, batch.vision_index, features.to(embeddings.dtype))
        segments = make_segments(batch.cu_seqlens, batch.max_seqlen, backend, sharing=sharing)
        hidden: Tensor = self.model(embeddings, batch.position_ids, segments, caches)
        return hidden

    def _sharing(self, batch: PackedBatch) -> Sharing | None:
        if not isinstance(batch, PackSlice):
            return None
        assert self.exchange is not None
        return Sharing(self.exchange, batch)

    def _continue(self, request: LogitsRequest) -> Tensor:
        """Hidden states [D, hidden] of one new token per document; what came before lies in the caches."""
        assert isinstance(request.inputs, Tensor)
        assert request.position_ids is not None
        embeddings = self.model.embed_tokens(request.inputs)
        count = request.inputs.shape[0]
        borders = torch.arange(count + 1, dtype=torch.int32, device=embeddings.device)
        hidden: Tensor = self.model(embeddings, request.position_ids, Segments(borders, 1, ()), request.caches)
        return hidden

    def _patches(self, batch: PackedBatch, backend: Backend) -> Patches:
        assert backend != "auto"
        segments = make_segments(batch.vision_cu_seqlens, batch.vision_max_seqlen, backend)
        return Patches(batch.image_patches, batch.video_patches, batch.patch_positions, segments)

    def _output_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
