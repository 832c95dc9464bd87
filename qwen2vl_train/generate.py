"""Text from our own model: packed prompts with images and clips, a key-value cache, greedy choice or sampling.

Enters: encoded prompts (they end where the answer begins). Leaves: the new token ids of each. Prompts are read packed,
several documents a pass, up to `prefill_tokens` at once; then each pass adds one token to every unfinished document.
Positions go on at the prompt's largest position + 1 on all three axes (Qwen2-VL paper, section 2.1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from data_pipelines.errors import UserError
from data_pipelines.pack.collate import collate
from data_pipelines.samples import Encoded, PackedBatch
from data_pipelines.tokenizer import SpecialTokens
from qwen2vl_train.model.cache import KeyValueCache
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.qwen2vl import LogitsRequest, Qwen2VL
from qwen2vl_train.model.weights import load_hf


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: greedy at `temperature` 0, else drawn from the likeliest words.

    Those are the first words that together hold probability `top_p`, at most `top_k` of them (0: any number).
    Raises ValueError outside temperature >= 0, 0 < top_p <= 1, top_k >= 0.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(f"{self}: temperature >= 0, 0 < top_p <= 1 and top_k >= 0 are needed")


def open_model(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> Qwen2VL:
    """The model in `folder`, ready to generate on `device`, filled tensor by tensor: nothing is held twice.

    `dtype` None: see `inference_dtype`. Errors as `weights.load`.
    """
    with torch.device("meta"):
        model = Qwen2VL(ModelConfig.from_hf(folder))
    model = model.to(dtype or inference_dtype(device)).to_empty(device=device)
    load_hf(model, folder)
    return model.eval()


def inference_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, as models are trained there and as flash attention needs it; float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.inference_mode()
def generate(
    model: Qwen2VL,
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | None = None,
    *,
    prefill_tokens: int = 16_384,
) -> list[list[int]]:
    """Continue each prompt until one of `stop_ids` (kept as the last token) or `max_new_tokens`.

    The model is whole (not partitioned).
    Raises ValueError for an empty prompt or a `max_new_tokens` below 1.
    """
    sampling = sampling or Sampling()
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
    empty = [prompt.key for prompt in prompts if not len(prompt.input_ids)]
    if empty:
        raise UserError(f"empty prompt: {', '.join(empty)}")
    if not prompts:
        return []
    weight = model.model.embed_tokens.weight
    capacity = max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens
    cache = KeyValueCache(model.config.text, len(prompts), capacity, weight.device, weight.dtype)
    chooser = _Chooser(sampling, weight.device)

    tokens, positions = _read_prompts(model, prompts, cache, chooser, prefill_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))  # the prompt that each row of the cache belongs to, finished ones included
    for produced in range(1, max_new_tokens + 1):
        open_rows = _record(answers, running, tokens.tolist(), stop_ids)
        if not open_rows or produced == max_new_tokens:
            break
        if 2 * len(open_rows) <= len(running):  # finished documents are dropped when they are half of the work
            kept = torch.tensor(open_rows, device=weight.device)
            cache.keep(kept)
            tokens, positions = tokens[kept], positions[kept]
            running = [running[row] for row in open_rows]
        cache.advance()
        rows = torch.arange(len(running), device=weight.device)
        request = LogitsRequest(tokens, rows, positions.expand(3, -1), list(cache.layers))
        tokens, positions = chooser(model(request)), positions + 1
    return answers


def _record(answers: list[list[int]], running: list[int], tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """Add each row's token to its answer, unless that has ended; the rows that go on."""
    open_rows = []
    for row, (prompt, token) in enumerate(zip(running, tokens, strict=True)):
        answer = answers[prompt]
        if answer and answer[-1] in stop_ids:
            continue
        answer.append(token)
        if token not in stop_ids:
            open_rows.append(row)
    return open_rows


def _read_prompts(
    model: Qwen2VL,
    prompts: Sequence[Encoded],
    cache: KeyValueCache,
    chooser: _Chooser,
    prefill_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Fill the cache; the first new token of each prompt int64 [N] and its position int64 [N]."""
    logits, positions = [], []
    for first, pack in _packs(model, prompts, prefill_tokens):
        ends = pack.cu_seqlens[1:].long() - 1
        cache.prefill(first, pack.cu_seqlens, pack.num_tokens, pack.max_seqlen)
        logits.append(model(LogitsRequest(pack, ends, caches=list(cache.layers))))
        # positions never fall within a document except inside media, whose tokens all lie below the text after them
        documents = cache.documents - first
        largest = torch.zeros(len(ends), dtype=torch.int64, device=ends.device)
        positions.append(largest.scatter_reduce(0, documents, pack.position_ids.amax(0), "amax") + 1)
    return chooser(torch.cat(logits)), torch.cat(positions)


def _packs(model: Qwen2VL, prompts: Sequence[Encoded], prefill_tokens: int) -> Iterator[tuple[int, PackedBatch]]:
    """Neighbouring prompts in packs of at most `prefill_tokens` (one prompt may be longer), with the first's number."""
    config, device = model.config, model.model.embed_tokens.weight.device
    # collation reads these three ids alone; the tokenizer itself is not needed here
    special = cast(SpecialTokens, _Pads(config.bos_token_id, config.image_token_id, config.video_token_id))
    counted = config.positions == "1d"
    first, tokens = 0, 0
    for number, prompt in enumerate([*prompts, None]):
        size = 0 if prompt is None else len(prompt.input_ids)
        if number > first and (prompt is None or tokens + size > prefill_tokens):
            yield first, collate(first, prompts[first:number], special, tokens, one_dimensional=counted).to(device)
            first, tokens = number, 0
        tokens += size


@dataclass(frozen=True)
class _Pads:
    endoftext: int
    image_pad: int
    video_pad: int


class _Chooser:
    """Logits [N, V] -> one token each, int64 [N]."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.temperature == 0.0:
            return logits.argmax(-1)
        logits, order = (logits / sampling.temperature).sort(dim=-1, descending=True)
        probabilities = logits.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= sampling.top_p] = 0.0  # the first word stays: nothing comes before it
        if sampling.top_k:
            probabilities[:, sampling.top_k :] = 0.0
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)
        return order.gather(1, drawn).squeeze(1)
