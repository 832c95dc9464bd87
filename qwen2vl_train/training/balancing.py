"""What a pack costs the model, for the data to deal packs evenly (`data_pipelines.plan.balance`).

Enters: the model's sizes and the parts that train. Leaves: four coefficients per part, over tokens, patches and pairs.
The head is left out: it counts labels, which a plan over lengths does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipelines.plan.balance import COST_NAME, PackCost
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import PackLengths, pack_flops
from qwen2vl_train.model.parts import PARTS


def part_costs(config: ModelConfig, trainable: Sequence[str]) -> dict[str, PackCost]:
    """FLOPs of each part, from lengths. All patches count as still images' (0.05% too few for clips)."""

    def counting(part: str) -> Callable[[Sequence[int], Sequence[int]], float]:
        def count(documents: Sequence[int], segments: Sequence[int]) -> float:
            lengths = PackLengths(tuple(documents), tuple(segments), sum(segments), 0, 0)
            return float(getattr(pack_flops(config, lengths, trainable), part))

        return count

    return {part: PackCost.of(counting(part)) for part in PARTS}


def pack_cost(config: ModelConfig, trainable: Sequence[str]) -> PackCost:
    """FLOPs of all parts together."""
    costs = part_costs(config, trainable).values()
    return PackCost(*(sum(getattr(cost, name) for cost in costs) for name in PackCost.__slots__))


def write_pack_cost(folder: Path, cost: PackCost) -> None:
    """Leave `cost` in a stage's folder: with it `qwen2vl-data show` deals the packs as the stage did."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COST_NAME).write_text(json.dumps(asdict(cost)), encoding="utf-8")
