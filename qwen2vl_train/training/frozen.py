"""The frozen parameters in a checkpoint, readable for any number of ranks.

Enters: the `*model_states.pt` of a checkpoint: one with the whole model, or under ZeRO-3 every rank's, with its
partition of each frozen parameter. Leaves: a `TensorSource`. The files are mapped, so a rank reads from disk what it
takes and no more. DeepSpeed (0.19.8) puts frozen parameters back only at the same number of ranks: its universal
checkpoint leaves them out.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.errors import UserError

_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt$")


class FrozenParts:
    """What the checkpoint `folder` (its `engine` folder) holds of frozen parameters.

    Under ZeRO-3 rank r of N wrote elements r x k .. (r + 1) x k - 1 of each flattened tensor, k the same on all, the
    last part padded.

    Raises:
        UserError: there is no *_model_states.pt in `folder`.
    """

    def __init__(self, folder: Path) -> None:
        files = {int(found[1] or 0): path for path in folder.iterdir() if (found := _FILE.search(path.name))}
        if not files:
            raise UserError(f"{folder}: no *model_states.pt is there; name another checkpoint with resume=PATH")
        # as DeepSpeed reads them itself: they hold settings beside tensors; a checkpoint is the run's own work
        states = [torch.load(files[rank], "cpu", weights_only=False, mmap=True) for rank in sorted(files)]
        partitioned = "zero_pp_rank" in files[0].name
        first = states[0]["frozen_param_shapes"] if partitioned else states[0]["module"]
        key = "frozen_param_fragments" if partitioned else "module"
        self._shapes = {name: tuple(getattr(item, "shape", item)) for name, item in first.items()}
        self._parts = {name: [state[key][name] for state in states] for name in self._shapes}

    def names(self) -> Collection[str]:
        """Every frozen parameter's name."""
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of the flattened tensor."""
        parts = [part.reshape(-1) for part in self._parts[name]]
        size = parts[0].numel()
        return torch.cat([
            parts[rank][max(start - rank * size, 0) : stop - rank * size]
            for rank in range(start // size, -(-stop // size))
        ])  # fmt: skip
