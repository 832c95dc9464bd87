"""Our packed model against transformers', and our loss against full logits. Forward and backward only.

    python -m benchmarks.model                  # a small model on the CPU, two minutes on an idle machine
    python -m benchmarks.model --device cuda    # Qwen2-VL-2B in bf16

The small model's head costs the same share of its decoder's FLOPs as in 2B, and its ViT the same share of a pack of
images. Lengths come from two fixed files (longest/mean = 4, 10% labels). The baselines get the same samples in batches
padded to the longest, and one at a time; each with logits everywhere or only where a label is, with SDPA or eager
attention, and the fastest of its settings counts. Rounds are interleaved; the median of each counts.
On a busy machine `--cpu-time --threads 1` counts processor time instead of the clock.

Last line: JSON. `ratio_*` are supervised tokens per second of ours over the baseline's (more is better), `head_*` our
loss over the plain one at 4,096 positions x 151,936 words (less is better).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.baseline import build_reference, pad_together, reference_step
from benchmarks.peak import measure_peak
from data_pipelines.pack.collate import collate
from data_pipelines.samples import IGNORE_INDEX, Encoded, MediaPlan, PackedBatch
from data_pipelines.tokenizer import SpecialTokens
from qwen2vl_train.model.config import ModelConfig, TextConfig, VisionConfig
from qwen2vl_train.model.cost import PackLengths, pack_flops
from qwen2vl_train.model.head import linear_cross_entropy
from qwen2vl_train.model.parts import PARTS
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise

LENGTHS = Path(__file__).with_name("lengths")
SAMPLES_PER_PACK = 16
NUM_SPECIAL = 13

Step = Callable[[], object]
Work = list[Step]  # one step per batch


def small_config() -> ModelConfig:
    """7 million parameters in the proportions of 2B: the head 0.18 of the decoder, a ViT of its share."""
    words = 2736
    return _with_special_ids(
        ModelConfig(
            VisionConfig(depth=4, embed_dim=192, num_heads=3),
            TextConfig(words, 256, 1024, 4, 4, 2, mrope_section=(8, 12, 12)),
        )
    )


def special_tokens(config: ModelConfig) -> SpecialTokens:
    """The last ids of the vocabulary."""
    return SpecialTokens(*range(config.text.vocab_size - NUM_SPECIAL, config.text.vocab_size))


def _with_special_ids(config: ModelConfig) -> ModelConfig:
    return config.with_token_ids(special_tokens(config))


def read_documents(name: str, special: SpecialTokens, scale: int) -> list[Encoded]:
    """The file's documents with random words and pixels; `scale` lengthens text and images' areas alike."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for number, entry in enumerate(json.loads((LENGTHS / f"{name}.json").read_text())["documents"]):
        ids: list[int] = []
        plans, patches = [], []
        for rows, columns in entry["images"]:
            plan = MediaPlan("image", (1, rows, columns * scale), 1)
            ids += [special.vision_start, *[special.image_pad] * plan.num_tokens, special.vision_end]
            plans.append(plan)
            patches.append(torch.randint(0, 256, (plan.num_patches, 588), dtype=torch.uint8, generator=generator))
        ids += torch.randint(0, special.endoftext, (entry["text"] * scale,), generator=generator).tolist()
        input_ids = torch.tensor(ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[-min(entry["labels"] * scale, len(ids) - 1) :] = input_ids[-min(entry["labels"] * scale, len(ids) - 1) :]
        documents.append(Encoded(str(number), 0, input_ids, labels, tuple(plans), tuple(patches)))
    return documents


def compare(name: str, config: ModelConfig, clock: Clock, dtype: torch.dtype, rounds: int, scale: int) -> dict:
    """Supervised tokens per second of ours, padded and unpacked on one file of lengths."""
    device, special = clock.device, special_tokens(config)
    documents = read_documents(name, special, scale)
    groups = [documents[i : i + SAMPLES_PER_PACK] for i in range(0, len(documents), SAMPLES_PER_PACK)]
    packs = [collate(n, group, special, 1 << 20) for n, group in enumerate(groups)]
    singles = [[collate(0, [document], special, 1 << 20) for document in group] for group in groups]
    _describe(name, config, packs)
    supervised = sum(pack.num_supervised for pack in packs)

    model = Qwen2VL(config)
    initialise(model, 0)
    model = model.to(device, dtype).train()
    candidates: dict[str, dict[str, Work]] = {"padded": {}, "unpacked": {}}
    candidates["ours"] = {"packed": [partial(_ours, model, pack.to(device)) for pack in packs]}
    for attention in ("sdpa", "eager"):
        reference = build_reference(config, attention, dtype, device)
        padded = [pad_together(group, device, dtype) for group in singles]
        alone = [pad_together([sample], device, dtype) for group in singles for sample in group]
        for supervised_only in (False, True):
            setting = f"{attention}, logits {'at labels' if supervised_only else 'everywhere'}"
            for way, batches in (("padded", padded), ("unpacked", alone)):
                candidates[way][setting] = [partial(reference_step, reference, b, supervised_only) for b in batches]
    seconds = _interleave(_choose(candidates, clock), rounds, clock)
    speeds = {way: supervised / value for way, value in seconds.items()}
    for way, speed in speeds.items():
        print(f"  {way:<9} {speed:10.0f} supervised tokens/s   {seconds[way] * 1e3:8.0f} ms")
    return speeds


def compare_heads(positions: int, words: int, hidden: int, clock: Clock, dtype: torch.dtype, rounds: int) -> dict:
    """Peak memory above the weight and its gradient, and time, of our loss over the plain one."""
    generator, device = torch.Generator().manual_seed(0), clock.device
    weight = (0.02 * torch.randn(words, hidden, generator=generator)).to(device, dtype).requires_grad_()
    states = torch.randn(positions, hidden, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(0, words, (positions,), generator=generator).to(device)

    def ours() -> None:
        weight.grad = states.grad = None
        linear_cross_entropy(states, weight, targets).loss_sum.backward()

    def plain() -> None:
        weight.grad = states.grad = None
        F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum").backward()

    peaks = {}
    for name, step in (("ours", ours), ("plain", plain)):
        weight.grad = states.grad = None
        gc.collect()
        peaks[name] = measure_peak(step, device).peak_bytes - weight.nbytes
    seconds = _interleave({"ours": [ours], "plain": [plain]}, rounds, clock)
    for name, peak in peaks.items():
        print(f"  {name:<9} {peak / 2**20:10.0f} MiB above the weight's gradient   {seconds[name] * 1e3:8.0f} ms")
    return {
        "head_memory_ratio": round(peaks["ours"] / peaks["plain"], 4),
        "head_time_ratio": round(seconds["ours"] / seconds["plain"], 3),
    }


def _describe(name: str, config: ModelConfig, packs: Sequence[PackedBatch]) -> None:
    """Print the file's shape, and the proportions of the model beside those of 2B on the same lengths."""
    lengths = [PackLengths.of(pack) for pack in packs]
    documents = [n for each in lengths for n in each.documents]
    print(
        f"\n{name}: {len(documents)} documents, {sum(documents)} tokens, longest/mean "
        f"{max(documents) * len(documents) / sum(documents):.2f}, labels {sum(x.supervised for x in lengths)}"
    )
    for title, sizes in (("this model", config), ("2B", ModelConfig())):
        flops = [pack_flops(sizes, each, PARTS) for each in lengths]
        total = sum(each.total for each in flops)
        vision = sum(each.vit + each.merger for each in flops) if not packs[0].dummy_vision else 0
        text = sizes.text
        layer = 2 * text.hidden_size * (text.hidden_size + text.num_key_value_heads * text.head_dim)
        body = text.num_hidden_layers * (layer + 3 * text.hidden_size * text.intermediate_size)
        print(
            f"  {title:<11} head/decoder {text.vocab_size * text.hidden_size / body:.3f}   "
            f"ViT's share of the FLOPs {vision / total:.2f}"
        )


def _ours(model: Qwen2VL, pack: PackedBatch) -> None:
    model.zero_grad(set_to_none=True)
    model(pack).loss_sum.backward()


@dataclass(frozen=True)
class Clock:
    """Times a step on `device`: by the wall, or by the process's processor time."""

    device: torch.device
    processor: bool

    def seconds(self, work: Work) -> float:
        read = time.process_time if self.processor else time.perf_counter
        self._wait()
        start = read()
        for step in work:
            step()
        self._wait()
        return read() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _choose(candidates: dict[str, dict[str, Work]], clock: Clock) -> dict[str, Work]:
    """Each way's fastest setting, from one run each after one batch to warm up."""
    chosen = {}
    for way, settings in candidates.items():
        times = {}
        for setting, work in settings.items():
            work[0]()
            times[setting] = clock.seconds(work)
        best = min(times, key=times.__getitem__)
        print(f"  {way:<9} " + "; ".join(f"{name} {value * 1e3:.0f} ms" for name, value in times.items()), flush=True)
        chosen[way] = settings[best]
    return chosen


def _interleave(ways: dict[str, Work], rounds: int, clock: Clock) -> dict[str, float]:
    """Median seconds of each way; every round runs each once, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(clock.seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repeats (%(default)s)")
    parser.add_argument("--only", choices=("text", "images", "head"), help="one of the three comparisons")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--positions", type=int, default=4096, help="labelled positions of the head (%(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of the clock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = Clock(device, options.cpu_time)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    config = _with_special_ids(ModelConfig()) if cuda else small_config()
    print(f"{device}, {dtype}, torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    results = {}
    unpacked = []
    for name in ("text", "images"):
        if options.only not in (None, name):
            continue
        speeds = compare(name, config, clock, dtype, options.rounds, scale=8 if cuda else 1)
        results[f"ratio_padded_{name}"] = round(speeds["ours"] / speeds["padded"], 3)
        unpacked.append(speeds["ours"] / speeds["unpacked"])
        gc.collect()
    if unpacked:
        results["ratio_unpacked"] = round(min(unpacked), 3)
    if options.only in (None, "head"):
        hidden = config.text.hidden_size
        print(f"\nhead and loss: {options.positions} positions x {151_936} words, width {hidden}")
        results |= compare_heads(options.positions, 151_936, hidden, clock, dtype, max(3, options.rounds // 2))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
