"""The Qwen2 decoder over one packed sequence: embeddings in, normalised hidden states out.

Enters: [T, D] embeddings, M-RoPE cosines and sines, document borders. Leaves: [T, D] after the final norm.
Names are those of the published checkpoints (`model.*`). With a cache, keys and values of each layer are kept and
single new tokens attend to them (generation).

Legend: T tokens, D hidden size, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qwen2vl_train.model.attention import Segments, attend
from qwen2vl_train.model.config import TextConfig
from qwen2vl_train.model.pointwise import rms_norm
from qwen2vl_train.model.rope import Rotary, rotate, text_rotary


class LayerCache(Protocol):
    """Keys and values of one layer: takes in the new ones and answers what the queries attend to."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """Take query [T, H, d], key and value [T, G, d] of the new tokens -> [T, H, d]."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean square in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Take x [..., D] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class TextAttention(nn.Module):
    """Causal grouped-query attention inside each document."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, segments: Segments, cache: LayerCache | None) -> Tensor:
        """Take x [T, D] -> [T, D]; with a cache, the new tokens attend to what it holds, too."""
        query, key, value = (
            projection(x).unflatten(1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is None:
            mixed = attend(query, key, value, segments, causal=True)
        else:
            mixed = cache.attend(query, key, value, segments)
        out: Tensor = self.o_proj(mixed.flatten(1))
        return out


class TextMlp(nn.Module):
    """Gated feed-forward layer, silu(gate) * up."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take x [T, D] -> [T, D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer; [T, D] -> [T, D]. `inner` does the work, so that it can be compiled alone."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = TextAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TextMlp(config)
        self.inner = self._layer

    def forward(self, x: Tensor, rotary: Rotary, segments: Segments, cache: LayerCache | None = None) -> Tensor:
        """Take x [T, D] -> [T, D]."""
        # generation changes the cache's shape at every step: it stays with the plain function
        return self.inner(x, rotary, segments, cache) if cache is None else self._layer(x, rotary, segments, cache)

    def _layer(self, x: Tensor, rotary: Rotary, segments: Segments, cache: LayerCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, segments, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Token embeddings, layers and final norm. `checkpointing` n recomputes every n-th layer (0: none, 1: all)."""

    def __init__(self, config: TextConfig, checkpointing: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, segments: Segments, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """Take embeddings [T, D], position_ids int [3, T] -> hidden states [T, D] after the final norm."""
        rotary = text_rotary(position_ids, self.config.rope_theta, self.config.mrope_section)
        x = embeddings
        for index, layer in enumerate(self.layers):
            if caches is not None:
                x = layer(x, rotary, segments, caches[index])
            elif self.checkpointing and index % self.checkpointing == 0 and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, segments, use_reentrant=False)
            else:
                x = layer(x, rotary, segments)
        out: Tensor = self.norm(x)
        return out
