"""Attention within documents of a packed sequence: one small interface, two backends.

Enters: queries [T, H, d], keys and values [T, G, d] (G key/value heads, G divides H) and the borders of the segments
(documents of the decoder, temporal steps of the vision transformer). Leaves: [T, H, d]. Nothing is padded.
Where several ranks share a pack, T counts this rank's tokens and the borders are the whole pack's (`sharing.py`).

- `reference`: exact, any device and dtype: scaled_dot_product_attention per segment; neighbouring segments of equal
  length share one batched call. Reads the lengths on the host.
- `varlen`: torch.nn.attention.varlen (flash attention), CUDA in bf16 or fp16; no host synchronisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from data_pipelines.errors import UserError
from qwen2vl_train.model.sharing import Sharing

Backend = Literal["auto", "varlen", "reference"]

FLASH_HEAD_MULTIPLE = 8
# Looked up here, not in the call, which compiled blocks trace. torch 2.11 takes fewer key heads without being told.
_SAYS_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Run:
    """`count` neighbouring segments of `length` tokens each, beginning at token `start`."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Segments:
    """Where attention may look. `runs` is None for the varlen backend, which reads `cu_seqlens` on the device.

    `sharing` is set where this rank holds a slice of the pack's tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    runs: tuple[Run, ...] | None
    sharing: Sharing | None = None


def resolve_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Literal["varlen", "reference"]:
    """The backend that runs: "auto" takes varlen on CUDA in half precision, else the reference.

    Raises ValueError where varlen is asked for and cannot run.
    """
    possible = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if backend == "varlen" and not possible:
        raise UserError(f"attention 'varlen' needs CUDA and bf16 or fp16, found {device.type} and {dtype}; use 'auto'")
    return "varlen" if possible and backend != "reference" else "reference"


def make_segments(
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: Literal["varlen", "reference"],
    lengths: Sequence[int] | None = None,
    sharing: Sharing | None = None,
) -> Segments:
    """Prepare the borders once for all layers. cu_seqlens int32 [D + 1]; `lengths` saves reading them where known."""
    if backend == "varlen":
        return Segments(cu_seqlens, max_seqlen, None, sharing)
    known = cu_seqlens.diff().tolist() if lengths is None else lengths
    return Segments(cu_seqlens, max_seqlen, tuple(_runs(known)), sharing)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Softmax attention inside each segment; query [T, H, d], key and value [T, G, d] -> [T, H, d]."""
    if segments.sharing is None:
        return _attend_locally(query, key, value, segments, causal)
    shared: Tensor = _attend_by_heads(query, key, value, segments, causal)
    return shared


@torch.compiler.disable  # type: ignore[untyped-decorator]  # each pack's slices would be a graph of their own
def _attend_by_heads(query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool) -> Tensor:
    assert segments.sharing is not None
    query, key, value = segments.sharing.to_heads(query, key, value)
    return segments.sharing.to_tokens(_attend_locally(query, key, value, segments, causal))


def _attend_locally(query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool) -> Tensor:
    if segments.runs is None:
        return _varlen(query, key, value, segments, causal)
    mixed: Tensor = _reference(query, key, value, segments.runs, causal)
    return mixed


def _runs(lengths: Sequence[int]) -> list[Run]:
    """Group neighbours of equal length: [4, 4, 9] -> (0, 2 x 4), (8, 1 x 9). Empty segments hold no query."""
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = sum(1 for _ in group)
        if length:
            runs.append(Run(start, count, length))
        start += count * length
    return runs


@torch.compiler.disable  # type: ignore[untyped-decorator]  # each list of lengths would be a graph of its own
def _reference(query: Tensor, key: Tensor, value: Tensor, runs: tuple[Run, ...], causal: bool) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    # split, not slices: its backward joins the gradients once, a slice's fills and adds a whole tensor per segment
    sizes = [run.count * run.length for run in runs]
    for run, *parts in zip(runs, *(torch.split(x, sizes) for x in (query, key, value)), strict=True):
        # [n, H, length, d] views: no copy goes into the kernel
        q, k, v = (part.view(run.count, run.length, *part.shape[1:]).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, causal: bool) -> Tensor:
    head_dim = query.shape[-1]
    padding = -head_dim % FLASH_HEAD_MULTIPLE
    if padding:  # zero columns change neither the products nor, cut off again, the result; the scale is the true size's
        query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    borders, longest = segments.cu_seqlens, segments.max_seqlen
    window = (-1, 0) if causal else (-1, -1)
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _SAYS_GROUPED else {}
    mixed = varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=head_dim**-0.5, window_size=window, **grouped
    )
    assert isinstance(mixed, Tensor)  # a pair only where more is asked for
    return mixed[..., :head_dim] if padding else mixed
