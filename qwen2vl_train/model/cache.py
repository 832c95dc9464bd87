"""Key-value cache of generation: prompts come in packed, then every step adds one token to each document.

Enters: keys and values of each layer as the decoder computes them. Leaves: the attention of the new tokens over all
that came before. Memory: 2 x layers x N x C x G x d numbers (C: longest prompt + new tokens); `keep` gives finished
documents' share back.

Legend: N documents, C capacity in tokens, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl_train.model.attention import Segments, attend
from qwen2vl_train.model.config import TextConfig


class KeyValueCache:
    """The cache of a whole model. `layers` goes to the decoder; `prefill` or `advance` precedes each forward pass."""

    def __init__(
        self, config: TextConfig, num_documents: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_documents, capacity, config.num_key_value_heads, config.head_dim)
        self.lengths = torch.zeros(num_documents, dtype=torch.int64, device=device)
        self.longest = 0
        self.documents = self.offsets = self.lengths  # where the tokens of the next forward pass go
        self.mask: Tensor | None = None
        self.layers = [
            LayerKeyValues(
                self, torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for _ in range(config.num_hidden_layers)
        ]

    def prefill(self, first_document: int, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> None:
        """The next pass brings whole prompts, packed; cu_seqlens int [n + 1], the first of them `first_document`."""
        lengths = cu_seqlens.diff().long()
        index = torch.arange(len(lengths), device=lengths.device)
        of_token = torch.repeat_interleave(index, lengths, output_size=num_tokens)
        self.documents = of_token + first_document
        self.offsets = torch.arange(num_tokens, device=lengths.device) - cu_seqlens.long()[of_token]
        self.lengths[first_document : first_document + len(lengths)] = lengths
        self.longest = max(self.longest, max_seqlen)
        self.mask = None

    def advance(self) -> None:
        """The next pass brings one token of every document, in order."""
        self.documents = torch.arange(len(self.lengths), device=self.lengths.device)
        self.offsets = self.lengths
        self.lengths = self.lengths + 1
        self.longest += 1
        places = torch.arange(self.longest, device=self.lengths.device)
        self.mask = (places < self.lengths[:, None])[:, None, None]

    def keep(self, documents: Tensor) -> None:
        """Go on with these documents alone; int64 [n], ascending."""
        self.lengths = self.lengths[documents]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[documents], layer.values[documents]


class LayerKeyValues:
    """Keys and values [N, C, G, d] of one layer."""

    def __init__(self, cache: KeyValueCache, keys: Tensor, values: Tensor) -> None:
        self.cache = cache
        self.keys = keys
        self.values = values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """Store the new tokens' key and value [T, G, d]; attention of query [T, H, d] -> [T, H, d]."""
        cache = self.cache
        self.keys[cache.documents, cache.offsets] = key
        self.values[cache.documents, cache.offsets] = value
        if cache.mask is None:
            return attend(query, key, value, segments, causal=True)
        # the H/G queries that share a key head stand as its rows: nothing is repeated
        grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])
        keys, values = (stored[:, : cache.longest].transpose(1, 2) for stored in (self.keys, self.values))
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=cache.mask).flatten(1, 2)
