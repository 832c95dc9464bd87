"""Parameter groups and their optimizer: one group per part x weight decay x ViT layer.

Enters: a model whose frozen parameters are already marked. Leaves: groups with their peak learning rate, and AdamW or
SGD over them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from qwen2vl_train.config import OptimConfig
from qwen2vl_train.model.parts import part_of, vit_layer


def parameter_groups(model: nn.Module, config: OptimConfig, vit_depth: int) -> list[dict[str, Any]]:
    """Trainable parameters grouped by (part, decay, ViT layer): groups with `name`, `lr`, `peak_lr`, `weight_decay`.

    Vectors (norms and biases) are not decayed. With `vit_layer_decay` d, the patch embedding and each block train at
    lr * d ** (blocks above); the last block keeps the full rate.
    """
    grouped: dict[tuple[str, bool, int], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            layer = vit_layer(name) if part == "vit" and config.vit_layer_decay < 1 else -1
            shape = getattr(
                parameter, "ds_shape", parameter.shape
            )  # ZeRO-3 empties a partitioned parameter's own shape
            grouped[part, len(shape) > 1, layer].append(parameter)
    groups = []
    for (part, decayed, layer), parameters in grouped.items():
        rate = getattr(config.lr, part) * (config.vit_layer_decay ** (vit_depth - layer) if layer >= 0 else 1.0)
        name = f"{part}{f'.{layer}' if layer >= 0 else ''}{'' if decayed else '.no_decay'}"
        weight_decay = config.weight_decay if decayed else 0.0
        groups.append({"params": parameters, "name": name, "lr": rate, "peak_lr": rate, "weight_decay": weight_decay})
    return groups


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW or SGD (one kernel per group on CUDA, one vectorised loop on CPU)."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, fused=True)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
