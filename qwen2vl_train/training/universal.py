"""What DeepSpeed's loader of universal checkpoints (0.19.8), which serve any number of ranks, does wrong and we mend.

Enters: DeepSpeed's ZeRO optimizer, or PyTorch's within it. Leaves: the same with state that is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor


@contextmanager
def padding_passed_over(zero: Any) -> Iterator[None]:
    """Inside, loading into ZeRO-1 or 2 leaves out the groups of which this rank holds nothing but padding.

    DeepSpeed takes a group's `step` from the first of its parameters here, and there is none: 16,640 elements on 256
    ranks are padded to 256 x 66, of which ranks 253 to 255 hold no element. Zeros without gradients need no state.
    """
    load = zero.load_hp_checkpoint_state_from_checkpoint_dir

    def load_held(attribute: str, folder: str) -> None:
        parameters, groups = getattr(zero, attribute), zero.optimizer.param_groups
        held = [any(parameter._hp_mapping is not None for parameter in group) for group in parameters]
        setattr(zero, attribute, list(compress(parameters, held)))
        zero.optimizer.param_groups = list(compress(groups, held))
        try:
            load(attribute, folder)
        finally:
            setattr(zero, attribute, parameters)
            zero.optimizer.param_groups = groups

    zero.load_hp_checkpoint_state_from_checkpoint_dir = load_held
    try:
        yield
    finally:
        del zero.load_hp_checkpoint_state_from_checkpoint_dir


def separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter of AdamW a `step` of its own on its own device.

    Loaded, one tensor on the host is shared by all: AdamW would advance it once per group, and refuses it on CUDA.
    """
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, copy=True)
