"""Parameter groups: what each part, each kind of parameter and each layer of the ViT trains at."""

import pytest

from qwen2vl_train.config import LearningRates, OptimConfig
from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.training.optim import parameter_groups
from tests.distributed.packs import CONFIG

RATES = LearningRates(vit=8e-4, merger=2e-3, llm=1e-3)


def groups_of(model, **settings):
    groups = parameter_groups(model, OptimConfig(RATES, weight_decay=0.1, **settings), CONFIG.vision.depth)
    return {group["name"]: group for group in groups}


def test_a_vit_layer_trains_at_its_parts_rate_times_the_decay_once_per_block_above_it():
    """Two blocks: the patch embedding (layer 0) has both above it, the last block (layer 2) none."""
    model = Qwen2VL(CONFIG)
    groups = groups_of(model, vit_layer_decay=0.5)
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {
            "vit.0": 2e-4,  # the patch embedding has no bias and no norm
            "vit.1": 4e-4,
            "vit.1.no_decay": 4e-4,
            "vit.2": 8e-4,
            "vit.2.no_decay": 8e-4,
            "merger": 2e-3,
            "merger.no_decay": 2e-3,
            "llm": 1e-3,
            "llm.no_decay": 1e-3,
        }
    )
    assert all(group["peak_lr"] == group["lr"] for group in groups.values())
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {
        name for name in groups if name.endswith(".no_decay")
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {name: {names[id(parameter)] for parameter in group["params"]} for name, group in groups.items()}
    assert held["vit.0"] == {"visual.patch_embed.proj.weight"}
    assert all(name.startswith("visual.blocks.0.") for name in held["vit.1"] | held["vit.1.no_decay"])
    assert all(name.startswith("visual.blocks.1.") for name in held["vit.2"] | held["vit.2.no_decay"])
    assert sum(map(len, held.values())) == len(names)


def test_without_layer_decay_the_vit_has_one_rate_and_frozen_parts_have_no_group():
    model = Qwen2VL(CONFIG)
    freeze(model, ("vit",))
    groups = groups_of(model)
    assert {name: group["lr"] for name, group in groups.items()} == {"vit": 8e-4, "vit.no_decay": 8e-4}
