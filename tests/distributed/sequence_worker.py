"""One rank of the tests of sequence parallelism: trains every case and writes what rank 0 saw.

Usage (under torchrun): sequence_worker OUT.pt PACKS RANKS_OF_A_PACK ZERO_STAGES TRAINABLES
PACKS names a function of `PACKS`. Lists are separated by commas, the parts of one TRAINABLES entry by +.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from data_pipelines.pack.collate import collate
from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import EngineConfig
from qwen2vl_train.model.config import TextConfig
from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.engine import building
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.sequence import SequenceGroup
from qwen2vl_train.training.step import LossTotals, train_step
from qwen2vl_train.training.world import World, end_world, start_world
from tests.distributed.exact_worker import OPTIM, RecordingEngine
from tests.distributed.packs import SPECIAL, VOCABULARY, document, model_config, uneven_packs

# two key/value heads for four query heads: shared out among two ranks, repeated for four
CONFIG = replace(model_config(), text=TextConfig(VOCABULARY, 32, 64, 2, 4, 2, mrope_section=(1, 1, 2)))
STEPS = 3


def mixed_packs(seed: int) -> list[PackedBatch]:
    """Six packs: text alone, stills and clips, clips alone, no label, no sample, and many frames in one document.

    Halves and quarters fall inside documents and inside the features of a still and of a clip.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    long = [document(generator, ("image", "video", "video", "image", "image"), 20, 15), document(generator, (), 9, 4)]
    return [
        *uneven_packs(4, seed),
        collate(4, [], SPECIAL, max_tokens=256),
        collate(5, long, SPECIAL, max_tokens=256),
    ]


def full_pack(seed: int) -> list[PackedBatch]:
    """One pack of 16,384 tokens: 10,000 words, then 300 stills and clips among words, then text again."""
    generator = torch.Generator().manual_seed(200 + seed)
    documents = [
        document(generator, (), 10_000, 500),
        document(generator, ("image", "video", "image") * 100, 1_000, 1_000),
        document(generator, (), 16_384 - 10_001 - 1 - 200 * 8 - 100 * 6 - 1_000 - 1, 4),
    ]
    pack = collate(0, documents, SPECIAL, max_tokens=16_384)
    assert pack.num_tokens == 16_384
    return [pack]


PACKS = {"mixed": mixed_packs, "full": full_pack}


def train(world: World, kind: str, ranks_of_a_pack: int, zero_stage: int, trainable: list[str]) -> dict:
    config = EngineConfig(
        zero_stage, "fp32", param_persistence_threshold=0, prefetch_bucket_size=100_000, reduce_bucket_size=100_000
    )
    group = SequenceGroup.form(world, ranks_of_a_pack, CONFIG.text.num_attention_heads, timeout_s=300)
    with building(config, world):
        model = Qwen2VL(CONFIG, vision_checkpointing=2, text_checkpointing=2, exchange=group.exchange)
    initialise(model, seed=1, rank=world.rank)
    freeze(model, trainable)
    accumulation = len(PACKS[kind](0)) // group.data_size
    groups = parameter_groups(model, OPTIM, CONFIG.vision.depth)
    engine = RecordingEngine(model, groups, OPTIM, config, world, accumulation)
    engine.train()
    totals = LossTotals(2, world.device)
    losses, norms = [], []
    for step in range(STEPS):
        mine = PACKS[kind](step)[group.data_rank :: group.data_size] if group.reads else []
        train_step(engine, group.deal(mine), totals, world)
        sums, counts = totals.read(world)
        losses.append([total / max(1, count) for total, count in zip(sums, counts, strict=True)])
        norms.append(engine.gradient_norm())
    weights = dict(engine.full_tensors())
    engine.close()
    return {"losses": losses, "norms": norms, "gradients": engine.gradients, "weights": weights}


def main() -> None:
    out, kind, shares, zero_stages, trainables = sys.argv[1:]
    torch.set_num_threads(1)
    world = start_world(300)
    results = {
        (share, stage, trainable): train(world, kind, share, stage, trainable.split("+"))
        for share in map(int, shares.split(","))
        for stage in map(int, zero_stages.split(","))
        for trainable in trainables.split(",")
    }
    if world.is_main:
        torch.save(results, out)
    world.barrier()
    end_world()


if __name__ == "__main__":
    main()
