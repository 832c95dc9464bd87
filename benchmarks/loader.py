"""The data way against its peers: reading and decoding end to end, fill, the planner's time, resume, balance.

    python -m benchmarks.loader [--pictures 256] [--rounds 5]

One thread, CPU time, medians of interleaved rounds, since other processes share the machine. webdataset and (where it
is installed) Megatron-Energon read the same shards. "decoded" does the same parsing, tokenising, decoding and collating
for all. "raw" only delivers each sample's bytes, of records of a chat's length and of pictures (118 KB): ours copied,
as the peers' are (of a picture that is most of the time, alike for all), and "mapped", as views of the shards. Lengths
of the plan are simulated. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import make_pictures
from benchmarks.planning import (
    fills,
    imbalances,
    main_seconds_per_step,
    new_planner,
    planner_mb,
    resume,
    seconds_per_step,
    us_by_packing,
    us_per_sample,
)
from data_pipelines.config import DataConfig, LoaderConfig, MediaConfig, PlanConfig, SourceConfig
from data_pipelines.decode.image import probe_image
from data_pipelines.decode.record import parse_record
from data_pipelines.encode.sample import SampleEncoder
from data_pipelines.index.build import build_missing
from data_pipelines.index.raw import raw_samples
from data_pipelines.loader import PackLoader
from data_pipelines.pack.collate import collate
from data_pipelines.plan.balance import PackCost
from data_pipelines.shards.writer import ShardWriter
from data_pipelines.sources.bpe import train_bpe
from data_pipelines.tokenizer import TextTokenizer

Sample = dict[str, bytes]
MAX_TOKENS = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=256, help="pictures of 640 x 480 to write and read")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rates, pack_bytes, images = end_to_end(Path(name), args.pictures, args.rounds)
    for way, rate in rates.items():
        print(f"{way:24} {rate:10.1f} samples/s per core")
    print(f"ours decoded: {rates['ours decoded']:.1f} images/s, {rates['ours decoded'] / images:.2f} packs/s per core")
    diets = fills()
    for diet, figures in diets.items():
        print(f"{diet:22} " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    sizes = {f"1e{power}": 10**power for power in (3, 5, 7, 9)}
    planner = {name: round(us_per_sample(new_planner(size)), 2) for name, size in sizes.items()}
    resume_s, state_bytes = resume(10**9)
    cost = cost_2b()
    balance = imbalances(cost) if cost is not None else {}
    print("imbalance of 256 ranks " + "  ".join(f"{key}: {value:.3f}" for key, value in balance.items()))

    def ratio(way: str, peer: str, ours: str = "ours") -> float | None:
        return round(rates[f"{ours} {way}"] / rates[f"{peer} {way}"], 2) if f"{peer} {way}" in rates else None

    summary = {
        "ratio_energon_decoded": ratio("decoded", "energon"),
        "ratio_energon_raw": ratio("raw records", "energon"),
        "ratio_energon_raw_pictures": ratio("raw pictures", "energon"),
        "ratio_webdataset_decoded": ratio("decoded", "webdataset"),
        "ratio_webdataset_raw": ratio("raw records", "webdataset"),
        "ratio_webdataset_raw_mapped": ratio("raw records", "webdataset", "ours mapped"),
        "ratio_webdataset_raw_pictures": ratio("raw pictures", "webdataset"),
        "ratio_webdataset_raw_pictures_mapped": ratio("raw pictures", "webdataset", "ours mapped"),
        "fill_mean": round(diets["short"]["ours"], 4),
        "share_under_98": round(diets["short"]["under_98"], 4),
        "planner_us_per_sample": planner,
        "planner_us_by_packing": {name: round(us, 2) for name, us in us_by_packing(cost).items()},
        "planner_mb": {name: round(planner_mb(size), 2) for name, size in sizes.items()},
        "resume_s": round(resume_s, 3),
        "state_bytes": state_bytes,
        "pack_bytes": pack_bytes,
        "imbalance_256": round(balance["sorted 8"], 3) if balance else None,
        "imbalance_256_by_accumulation": {way: round(value, 3) for way, value in balance.items()},
        "planner_s_per_step_1024": round(seconds_per_step(), 3),
        "planner_s_per_step_1024_short": round(seconds_per_step(short=True), 3),
        "planner_main_s_per_step_1024": round(main_seconds_per_step(), 5),
    }
    print(json.dumps(summary))


def cost_2b() -> PackCost | None:
    """FLOPs of Qwen2-VL-2B with everything trained, read from the model's own count."""
    try:
        from qwen2vl_train.model.config import ModelConfig
        from qwen2vl_train.model.cost import PackLengths, pack_flops
    except ImportError:
        return None
    config = ModelConfig()

    def flops(documents: Any, segments: Any) -> float:
        lengths = PackLengths(tuple(documents), tuple(segments), sum(segments), 0, 0)
        return float(pack_flops(config, lengths, {"vit", "merger", "llm"}).total)

    return PackCost.of(flops)


def end_to_end(folder: Path, pictures: int, rounds: int) -> tuple[dict[str, float], int, int]:
    """Samples per CPU second of each way, and the bytes and pictures of a pack of stills."""
    captions = [f"a picture number {number} of many colours and shapes" for number in range(pictures)]
    write_pictures(folder / "pictures", captions)
    write_records(folder / "records", 16 * pictures)
    train_bpe(captions, folder / "tokenizer", vocab_size=400)
    tokenizer = TextTokenizer(folder / "tokenizer")
    config = data_config(folder / "pictures")
    encoder = SampleEncoder(tokenizer, "plain", config.media, MAX_TOKENS)
    ways: dict[str, Callable[[], float]] = {"ours decoded": lambda: rate_of_loader(config, tokenizer, pictures)}
    for kind in ("records", "pictures"):
        for name, read in raw_readers(folder / kind).items():
            ways[f"{name} raw {kind}"] = lambda read=read: rate_of(read())
            if kind == "pictures" and not name.startswith("ours"):
                ways[f"{name} decoded"] = lambda read=read: rate_of(decoded(read(), encoder, tokenizer))
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            figures[name].append(measure())
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return medians, *size_of_pack(config, tokenizer)


def write_pictures(folder: Path, captions: list[str]) -> None:
    """Photographs of 640 x 480 with a caption each."""
    made = make_pictures()
    with ShardWriter(folder, "b", max_records=1024) as writer:
        for number, caption in enumerate(captions):
            data = made[number % len(made)]
            facts = probe_image(data, "0.jpg", "k")
            record = {"caption": caption, "media": {"0.jpg": {"width": facts.width, "height": facts.height}}}
            writer.write(f"{number:06d}", record, {"0.jpg": data})


def write_records(folder: Path, count: int) -> None:
    """Chats of 1 KB without media."""
    turns = [{"role": role, "content": "words of a turn " * 16} for role in ("user", "assistant") * 2]
    with ShardWriter(folder, "b", max_records=10_000) as writer:
        for number in range(count):
            writer.write(f"{number:06d}", {"messages": turns}, {})


def data_config(folder: Path) -> DataConfig:
    return DataConfig(
        {"b": SourceConfig((f"{folder}/b-*.tar",))},
        media=MediaConfig(),
        plan=PlanConfig(pool_size=64),
        loader=LoaderConfig(num_workers=0),
    )


def raw_readers(folder: Path) -> dict[str, Callable[[], Iterator[Any]]]:
    """Each way's reader of the same shards."""
    shards = sorted(map(str, folder.glob("b-*.tar")))
    build_missing(shards, None)
    readers: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: read_copied(shards),
        "ours mapped": lambda: read_mapped(shards),
        "webdataset": lambda: read_webdataset(shards),
    }
    if (energon := prepare_energon(folder)) is not None:
        readers["energon"] = energon
    return readers


def rate_of(samples: Iterator[Any]) -> float:
    start, count = time.process_time(), sum(1 for _ in samples)
    return count / (time.process_time() - start)


def rate_of_loader(config: DataConfig, tokenizer: TextTokenizer, pictures: int) -> float:
    """Plan, read, decode, encode and collate as a run does, in this process."""
    loader = PackLoader(config, tokenizer, 1, 0, 1, seed=0)
    steps = iter(loader)
    start, count = time.process_time(), 0
    while count < pictures:
        count += sum(len(batch.keys) for batch in next(steps))
    return count / (time.process_time() - start)


def size_of_pack(config: DataConfig, tokenizer: TextTokenizer) -> tuple[int, int]:
    """Bytes and pictures of the first pack."""
    batch = next(iter(PackLoader(config, tokenizer, 1, 0, 1, seed=0)))[0]
    return sum(value.nbytes for value in vars_of(batch) if isinstance(value, torch.Tensor)), len(batch.keys)


def vars_of(batch: Any) -> list[Any]:
    return [getattr(batch, name) for name in batch.__slots__]


def read_copied(shards: list[str]) -> Iterator[Sample]:
    """Every sample's members through the index, as `bytes`: what the peers give."""
    for _, members in raw_samples(shards):
        yield {name: bytes(member) for name, member in members.items()}


def read_mapped(shards: list[str]) -> Iterator[dict[str, memoryview]]:
    """The same as views of the mapped shards."""
    for _, members in raw_samples(shards):
        yield members


def read_webdataset(shards: list[str]) -> Iterator[Sample]:
    import webdataset

    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        yield {name: value for name, value in sample.items() if not name.startswith("__")}


def prepare_energon(folder: Path) -> Callable[[], Iterator[Sample]] | None:
    """A reader through Megatron-Energon, or None where it is not installed."""
    try:
        from megatron.energon import Cooker, TaskEncoder, WorkerConfig, get_train_dataset, stateless
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
    except ImportError:
        return None
    names = sorted(path.name for path in folder.glob("b-*.tar"))
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        WebdatasetPreparator.prepare_dataset(
            EPath(str(folder)), names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"
    )

    @stateless
    def cook(sample: Any) -> Any:
        return sample

    class Bytes(TaskEncoder):
        cookers = (Cooker(cook),)
        decoder = None

    def read() -> Iterator[Sample]:
        dataset = get_train_dataset(
            str(folder),
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            shuffle_over_epochs_multiplier=None,
            parallel_shard_iters=1,
            repeat=False,
            task_encoder=Bytes(),
        )
        from megatron.energon import get_loader

        for sample in get_loader(dataset):
            yield {name: value for name, value in sample.items() if not name.startswith("__")}

    return read


def decoded(samples: Iterator[Sample], encoder: SampleEncoder, tokenizer: TextTokenizer) -> Iterator[None]:
    """The same parsing, tokenising, decoding and collation for a peer's samples, packed as they come."""
    documents, tokens, packs = [], 0, 0
    for number, sample in enumerate(samples):
        members = {name: value if name in ("json", "txt") else None for name, value in sample.items()}
        document, _ = encoder.encode(parse_record(str(number), members), sample.__getitem__)
        if tokens + len(document.input_ids) > MAX_TOKENS:
            collate(packs, documents, tokenizer.special, MAX_TOKENS)
            documents, tokens, packs = [], 0, packs + 1
        documents.append(document)
        tokens += len(document.input_ids)
        yield None
    collate(packs, documents, tokenizer.special, MAX_TOKENS)


if __name__ == "__main__":
    main()
