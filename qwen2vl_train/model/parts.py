"""The parts of the model that a stage trains or freezes: ViT, merger, LLM.

Enters: parameter names. Leaves: each parameter's part, its `requires_grad`, and a table that proves the freezing.
A parameter that no rule covers stops the run: a stage that trains the wrong weights fails silently otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

PARTS = ("vit", "merger", "llm")

_RULES = (
    ("merger", re.compile(r"visual\.merger\.")),
    ("vit", re.compile(r"visual\.(patch_embed|blocks)\.")),
    ("llm", re.compile(r"(model\.(embed_tokens|layers|norm)|lm_head)\.")),
)
_VIT_BLOCK = re.compile(r"visual\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part: tensors and elements that train, and that are frozen."""

    part: str
    trainable_tensors: int
    trainable_parameters: int
    frozen_tensors: int
    frozen_parameters: int


def part_of(name: str) -> str:
    """The part a parameter belongs to. Raises ValueError where no rule matches."""
    for part, pattern in _RULES:
        if pattern.match(name):
            return part
    raise ValueError(f"parameter {name} belongs to no part ({', '.join(PARTS)}): add a rule or rename it")


def vit_layer(name: str) -> int:
    """Depth of a ViT parameter, for layer-wise learning rates: patch_embed 0, block i is i + 1.

    Raises ValueError for a parameter outside the ViT.
    """
    if name.startswith("visual.patch_embed."):
        return 0
    match = _VIT_BLOCK.match(name)
    if match is None:
        raise ValueError(f"parameter {name} is in no layer of the ViT")
    return int(match.group(1)) + 1


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Let exactly the parts in `trainable` require gradients. Raises ValueError for an unknown part or parameter."""
    unknown = sorted(set(trainable) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trainable)


def audit(model: nn.Module, trainable: Collection[str]) -> tuple[PartCount, ...]:
    """Count what trains and what is frozen, per part, and check it against the rule.

    Works on partitioned (ZeRO-3) parameters too. Raises ValueError naming the first parameter that trains against the
    rule, is frozen against it, or belongs to no part.
    """
    counts = {part: [0, 0, 0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if parameter.requires_grad != (part in trainable):
            state, rule = ("trains", "frozen") if parameter.requires_grad else ("is frozen", "trained")
            raise ValueError(f"parameter {name} {state}, but part {part} is to be {rule}")
        offset = 0 if parameter.requires_grad else 2
        counts[part][offset] += 1
        # a partitioned parameter has no elements of its own outside its module's forward pass
        counts[part][offset + 1] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return tuple(PartCount(part, *values) for part, values in counts.items())


def format_audit(rows: Collection[PartCount]) -> str:
    """The audit as a text table, one row per part."""
    lines = [f"{'part':<8}{'trainable':>18}{'frozen':>18}"]
    lines += [f"{row.part:<8}{row.trainable_parameters:>18,}{row.frozen_parameters:>18,}" for row in rows]
    return "\n".join(lines)
