"""Bytes a rank needs: parameters, gradients, optimizer state under a ZeRO stage, and activations of a pack.

Enters: a model's sizes, a pack's lengths, the parts that train, how they run. Leaves: bytes, counted tensor by tensor
as our code keeps them for the backward pass (checked against measured allocations). Left out: communication buffers,
the allocator's fragmentation, kernels' workspaces.

Legend: T tokens, P patches, L supervised positions, W ViT width, D hidden size, I feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import IMAGE_ROW, MERGED, PackLengths, parameter_counts
from qwen2vl_train.model.head import CHUNK_ELEMENTS

FLOAT32 = 4


@dataclass(frozen=True)
class Running:
    """How the model runs.

    `element_bytes` of weights and activations (bf16: 2, float32: 4); checkpointing of every n-th block (0: none);
    `varlen`: attention in one kernel (otherwise one call per run of equal documents, whose results are joined).
    """

    element_bytes: int = 2
    vision_checkpointing: int = 0
    text_checkpointing: int = 0
    varlen: bool = True


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between steps."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class ActivationBytes:
    """What a pack adds: `held` between forward and backward, `peak` the highest moment of the step.

    `peak` holds all gradients of the pack so far; `partitioned_peak` those of the module at hand alone, for an engine
    that takes each away into its own buffers (`StateBytes.gradients`). It leaves out the output matrix's gradient.
    """

    held: int
    peak: int
    partitioned_peak: int


@dataclass(frozen=True)
class _Step:
    """One module on the way back: what it holds, recomputes and needs for the moment, and its weights' gradients."""

    held: int
    recomputed: int
    working: int
    gradients: int


def state_bytes(
    config: ModelConfig, trainable: Collection[str], zero_stage: int, world: int, running: Running | None = None
) -> StateBytes:
    """Bytes of parameters, gradients and AdamW's state on one of `world` ranks.

    Gradients are accumulated in float32; the optimizer keeps float32 masters and two moments, 12 bytes a parameter (at
    stage 0 in float32 the parameters are their own masters). Stage 1 divides the optimizer, 2 the gradients too, 3 the
    parameters too. Frozen parts have neither gradients nor state.
    """
    element = (running or Running()).element_bytes
    counts = parameter_counts(config)
    trained = sum(count for part, count in counts.items() if part in trainable)
    moments = 8 if zero_stage == 0 and element == FLOAT32 else 12

    def share(count: int, divided_from: int) -> int:
        return -(-count // world) if zero_stage >= divided_from else count

    return StateBytes(
        parameters=share(sum(counts.values()), 3) * element,
        gradients=share(trained, 2) * FLOAT32,
        optimizer=share(trained, 1) * moments,
    )


def activation_bytes(
    config: ModelConfig, lengths: PackLengths, trainable: Collection[str], running: Running | None = None
) -> ActivationBytes:
    """Bytes that the forward and backward pass of one pack needs above the parameters."""
    how = running or Running()
    vision = _vision_steps(config, lengths, trainable, how)
    text = _text_steps(config, lengths, trainable, how)
    held = sum(step.held for step in (*vision, *text))
    head, head_gradients = _head(config, lengths, trainable, how)
    peak, partitioned = held + head + head_gradients, held + head
    if "vit" not in trainable:
        frozen = _frozen_vision_bytes(config, lengths, how)
        peak, partitioned = max(peak, frozen), max(partitioned, frozen)
    live, gradients = held, head_gradients
    for step in reversed((*vision, *text)):
        moment = live + step.recomputed + step.working + step.gradients
        peak, partitioned = max(peak, moment + gradients), max(partitioned, moment)
        live -= step.held
        gradients += step.gradients
    return ActivationBytes(held, peak, partitioned)


def _head(config: ModelConfig, lengths: PackLengths, trainable: Collection[str], how: Running) -> tuple[int, int]:
    """(one chunk of logits with the selected hidden states and their gradient, the output matrix's gradient)."""
    text, labels = config.text, lengths.supervised
    if not trainable:
        return 0, 0
    rows = min(labels, max(1, CHUNK_ELEMENTS // text.vocab_size))
    # in half precision the product and the slopes are stored beside the float32 chunk
    chunk = rows * text.vocab_size * (FLOAT32 if how.element_bytes == FLOAT32 else FLOAT32 + 2 * how.element_bytes)
    selected = 2 * labels * text.hidden_size * how.element_bytes
    matrix = text.vocab_size * text.hidden_size
    return chunk + selected, matrix * how.element_bytes if "llm" in trainable else 0


def _text_steps(
    config: ModelConfig, lengths: PackLengths, trainable: Collection[str], how: Running
) -> tuple[_Step, ...]:
    """Embeddings, layers and final norm of the decoder, in forward order."""
    text, tokens, element = config.text, lengths.tokens, how.element_bytes
    if not trainable:
        return ()
    trains = "llm" in trainable
    hidden, feed = tokens * text.hidden_size * element, tokens * text.intermediate_size * element
    kv = tokens * text.num_key_value_heads * text.head_dim * element
    joined = 0 if how.varlen or len(set(lengths.documents)) == 1 else 1
    # the layer's input; queries and attention's result; the residual in the middle
    layer = 4 * hidden + 2 * kv + 3 * feed + tokens * (text.num_attention_heads + 2) * FLOAT32
    if trains:  # and what the weights' gradients read: two normed inputs, the joined result, silu(gate) * up
        layer += (2 + joined) * hidden + feed
    matrix = text.vocab_size * text.hidden_size * element
    per_layer = 2 * text.hidden_size * (text.hidden_size + text.num_key_value_heads * text.head_dim)
    per_layer = (per_layer + 3 * text.hidden_size * text.intermediate_size) * element
    # back through silu(gate) * up: the product's gradient and both factors', less what was read last
    working = 2 * hidden + (2 if trains else 3) * feed
    # cosines and sines lie beside the embeddings; a tied matrix's second gradient is made before it is added
    embedding = _Step(2 * tokens * text.head_dim * FLOAT32, 0, hidden, matrix if trains else 0)
    layers = [
        _Step(hidden, layer - hidden, working, per_layer * trains)
        if how.text_checkpointing and index % how.text_checkpointing == 0
        else _Step(layer, 0, working, per_layer * trains)
        for index in range(text.num_hidden_layers)
    ]
    norm = _Step(hidden, 0, 4 * tokens * text.hidden_size * FLOAT32, 0)
    return (embedding, *layers, norm)


def _frozen_vision_bytes(config: ModelConfig, lengths: PackLengths, how: Running) -> int:
    """The widest moment of a frozen transformer's forward pass: normalising pixels, or QuickGELU in a block."""
    vision, patches = config.vision, lengths.patches
    pixels = 2 * IMAGE_ROW * (lengths.image_patches + 2 * lengths.video_patches) * FLOAT32
    # the block's input, the middle, its norm; QuickGELU's input, scaled input and output
    block = (3 + 3 * vision.mlp_ratio) * patches * vision.embed_dim * how.element_bytes
    return max(pixels, block + 2 * patches * vision.head_dim * FLOAT32)


def _vision_steps(
    config: ModelConfig, lengths: PackLengths, trainable: Collection[str], how: Running
) -> tuple[_Step, ...]:
    """Patch embedding, blocks and merger, in forward order. A frozen transformer holds nothing."""
    vision, patches, element = config.vision, lengths.patches, how.element_bytes
    trains, merges = "vit" in trainable, "merger" in trainable
    width = vision.embed_dim
    wide = patches * width * element
    feed = wide * vision.mlp_ratio
    steps = []
    if trains:
        pixels = IMAGE_ROW * (lengths.image_patches + 2 * lengths.video_patches) * element
        rotary = 2 * patches * vision.head_dim * FLOAT32
        steps.append(_Step(pixels + rotary, 0, wide, 2 * IMAGE_ROW * width * element))
        joined = 0 if how.varlen or len(set(lengths.segments)) == 1 else 1
        # input, normed, queries and keys, values, result (joined), middle, normed; before and after QuickGELU
        block = (8 + joined) * wide + 2 * feed + patches * (vision.num_heads + 4) * FLOAT32
        gradients = (4 * width * width + 2 * width * vision.mlp_dim) * element
        steps += [
            _Step(wide, block - wide, 2 * wide + feed, gradients)
            if how.vision_checkpointing and index % how.vision_checkpointing == 0
            else _Step(block, 0, 2 * wide + feed, gradients)
            for index in range(vision.depth)
        ]
    if trains or merges:
        merged = MERGED * width
        # input and the layer before GELU; for the weights also the normed input and the layer after it
        held = (4 if merges else 2) * wide + 2 * patches * FLOAT32
        gradients = (merged * merged + merged * config.text.hidden_size) * element if merges else 0
        steps.append(_Step(held, 0, 2 * wide, gradients))
    return tuple(steps)
