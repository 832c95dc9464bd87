"""One rank under real DeepSpeed ZeRO-3: runs the check named on the command line and asserts on every rank.

Usage (under torchrun): zero3_worker.py rotary | weights FOLDER | compiled
"""

from __future__ import annotations

import gc
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules

from qwen2vl_train.model import language
from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.language import DecoderLayer
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.vision import VisionBlock
from qwen2vl_train.model.weights import load_hf
from tests.model.builders import document, model_config, pack, tiny_model


def zero3_config(bf16: bool) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 40,
    }


def start_engine(model: Qwen2VL, config: dict):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def rotary() -> None:
    """Inside a bf16 engine whose model was built under zero.Init, angles at position 16,000 are those of float32."""
    config = ModelConfig(VisionConfig(1, 32, 2), TextConfig(300, 128, 64, 1, 1, 1), image_token_id=1, video_token_id=2)
    with deepspeed.zero.Init(config_dict_or_path=zero3_config(True)):
        model = Qwen2VL(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter.ds_tensor, 0.01)
    engine = start_engine(model, zero3_config(True))
    seen = []
    original = language.text_rotary

    def recording(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    language.text_rotary = recording
    batch = pack([document([16_001])])
    batch.input_ids = batch.input_ids % 300
    batch.loss_index, batch.loss_targets = batch.loss_index[-4:], batch.loss_targets[-4:] % 300
    with torch.no_grad():
        output = engine(batch)
    assert output.loss_sum.isfinite()
    (cos, sin), angles = seen[0], 16_000 * 1e6 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert cos.dtype == torch.float32
    # one float32 rounding of an angle of 16,000 rad is 5e-4; frequencies kept in bf16 would be tens of rad off
    assert (cos[-1, 0, :64] - angles.cos()).abs().max() < 2e-3
    assert (sin[-1, 0, 64:] - angles.sin()).abs().max() < 2e-3


def anonymous_bytes() -> int:
    """Resident memory that is this process's own (pages of mapped files, which the system can drop, left out)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def peak_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def weights(folder: str) -> None:
    """Loading a folder into partitions needs this rank's share and one tensor's rows, never the whole model."""
    config = ModelConfig.from_hf(folder)
    with deepspeed.zero.Init(config_dict_or_path=zero3_config(False)):
        model = Qwen2VL(config)
    total = sum(parameter.ds_numel for parameter in model.parameters()) * 4
    share = sum(parameter.ds_tensor.numel() for parameter in model.parameters()) * 4
    assert share < 0.51 * total
    largest = max(parameter.ds_numel for parameter in model.parameters()) * 4
    # load once so that allocator and library pages are there, then measure what a load adds
    load_hf(model, folder, dist.get_rank())
    gc.collect()
    before = anonymous_bytes()
    highest = before
    load = model.parameters

    def watching():
        nonlocal highest
        for parameter in load():
            highest = max(highest, anonymous_bytes())
            yield parameter

    model.parameters = watching
    load_hf(model, folder, dist.get_rank())
    highest = max(highest, anonymous_bytes())
    grown = highest - before
    assert grown < largest + (8 << 20), f"grew by {grown}, share {share}, model {total}"
    engine = start_engine(model, zero3_config(False))
    whole = Qwen2VL(config)
    load_hf(whole, folder)
    batch = pack([document([3, ("image", (1, 4, 4)), 5])])
    with torch.no_grad():
        ours, plain = engine(batch).loss_sum, whole(batch).loss_sum
    assert abs(ours - plain) < 1e-3 * abs(plain), (ours, plain)


def compiled() -> None:
    """Compiled inner functions of leaf blocks train as the plain ones do, for every length, in few graphs."""
    from torch._dynamo.utils import counters

    batches = [
        pack([document([3, ("image", (1, 4, 4)), 5 + n]), document([4 + 3 * n])]) if n != 1 else pack([document([9])])
        for n in range(4)
    ]
    losses = {}
    for compiling in (False, True):
        model = tiny_model(model_config(), vision_checkpointing=2, text_checkpointing=2)
        set_z3_leaf_modules(model, [VisionBlock, DecoderLayer])
        engine = start_engine(model, zero3_config(False))
        if compiling:
            model.compile_blocks("aot_eager")
        losses[compiling], graphs = [], []
        for batch in 2 * (batches[dist.get_rank() :] + batches[: dist.get_rank()]):  # ranks hold different packs
            output = engine(batch)
            graphs.append(counters["stats"]["unique_graphs"])
            losses[compiling].append(output.loss_sum.item())
            engine.backward(output.loss_sum)
            engine.step()
        engine.destroy()
    assert losses[True] == losses[False], losses
    # two kinds of block, cut in two by the reference attention, for fixed and for varying lengths: and then no more
    assert graphs[4:] == graphs[4:5] * 4, graphs
    assert graphs[-1] <= 12, graphs


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    {"rotary": rotary, "weights": weights, "compiled": compiled}[sys.argv[1]](*sys.argv[2:])
    dist.barrier()
    dist.destroy_process_group()
