"""One pack on several ranks: rows with each rank become heads with each rank for attention, and rows again.

Enters: queries, keys and values of this rank's tokens, all heads. Leaves: those of all tokens, this rank's heads
(DeepSpeed Ulysses, arXiv 2309.14509, section 3). Features of the vision transformer travel likewise, once. How rows
travel is passed in: nothing here knows processes. Costs two exchanges per layer and direction: each rank sends and
receives about T / N tokens of (H + 2 G) heads before attention and of H heads after it.

Legend: N ranks that share a pack, T its tokens, T_r those of this rank, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.pack.slice import PackSlice

# (rows [sum(send), ...], send, receive) -> rows [sum(receive), ...]: the first send[0] rows go to rank 0 of those that
# share the pack, and so on; receive[0] rows from rank 0 come first. Differentiable; every such rank makes the call.
Exchange = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True)
class Sharing:
    """This rank's place among those that share a pack: `own` is its slice, `exchange` reaches the others."""

    exchange: Exchange
    own: PackSlice

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query [T_r, H, d], key and value [T_r, G, d] -> [T, H / N, d] and twice [T, G' / N, d].

        Key/value heads that N does not divide are repeated up to G', the least common multiple: query heads stay with
        the head that they attend to, and as N divides H, so does G'.
        """
        tokens = self.own.slice_tokens
        ranks = len(tokens)
        copies = math.lcm(key.shape[1], ranks) // key.shape[1]
        if copies > 1:
            key, value = (heads.repeat_interleave(copies, dim=1) for heads in (key, value))
        shares = [
            heads.reshape(len(heads), ranks, heads.shape[1] // ranks, heads.shape[2]) for heads in (query, key, value)
        ]
        # [N, T_r, heads of one rank, d]: in one exchange, what goes to a rank lies together
        outgoing = torch.cat(shares, dim=2).transpose(0, 1).flatten(0, 1)
        rows = self.exchange(outgoing, [tokens[self.own.rank]] * ranks, tokens)
        return torch.split(rows, [share.shape[2] for share in shares], dim=1)

    def to_tokens(self, mixed: Tensor) -> Tensor:
        """[T, H / N, d] -> [T_r, H, d]."""
        tokens = self.own.slice_tokens
        ranks, count = len(tokens), tokens[self.own.rank]
        rows = self.exchange(mixed, tokens, [count] * ranks)
        return rows.reshape(ranks, count, *rows.shape[1:]).transpose(0, 1).flatten(1, 2)

    def deliver(self, features: Tensor) -> Tensor:
        """Features of this rank's frames [P_r / 4, D] -> those that its tokens take, in the order of `vision_index`."""
        outgoing = features.index_select(0, self.own.feature_order)
        return self.exchange(outgoing, self.own.features_sent, self.own.features_received)
