"""The plan on simulated lengths: time a sample by data size and packing, memory by data size, fill, resume, imbalance
of ranks, time a step of 1,024.
"""

from __future__ import annotations

import bisect
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.simulated import SimulatedSource, mixed_sources
from data_pipelines.config import MediaConfig, PlanConfig
from data_pipelines.pack.plan_process import PlannedStep, PlanProcess
from data_pipelines.plan.balance import PackCost, imbalance, order_by_cost
from data_pipelines.plan.mixture import Phase
from data_pipelines.plan.packer import PoolPacker
from data_pipelines.plan.planner import Planner
from data_pipelines.plan.shelf import Item

MAX_TOKENS = 16384
# Diets: median sample at most 1/16 of a pack ("short"), and harder ones.
DIETS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "short": lambda rng, n: rng.lognormal(np.log(400), 0.8, n),
    "half clips": lambda rng, n: np.where(
        rng.random(n) < 0.5, rng.uniform(4000, 16384, n), rng.lognormal(np.log(400), 0.8, n)
    ),
    "clips of 4k to 16k": lambda rng, n: rng.uniform(4000, 16384, n),
    "images near one size": lambda rng, n: np.clip(rng.normal(1280, 60, n), 1000, 1300) + rng.integers(20, 200, n),
}
# FLOPs of Qwen2-VL-2B from `qwen2vl_train.model.cost.pack_flops` with everything trained.
MEDIA = MediaConfig(max_pixels=4096 * 784)


def new_planner(num_samples: int, cost: PackCost | None = None, **plan: Any) -> Planner:
    """A planner of the mixed lengths; with a cost, its packs are made to cost alike. `plan`: settings of its own."""
    sources, weights = mixed_sources(num_samples)
    config = PlanConfig(**{"packing": "balanced" if cost else "pool", **plan})
    return Planner(sources, [Phase(0, tuple(weights))], MEDIA, config, seed=0, cost=cost)


def us_per_sample(planner: Planner, count: int = 40_000) -> float:
    """CPU µs a sample, after the tables of the first window were made; the median of three stretches."""
    warm_up(planner, 3 * count)
    times = []
    for _ in range(3):
        start, done = time.process_time(), 0
        while done < count:
            done += len(planner.next_pack().items)
        times.append((time.process_time() - start) / done * 1e6)
    return statistics.median(times)


def us_by_packing(cost: PackCost | None) -> dict[str, float]:
    """CPU µs a sample of each packing, and of pictures alone where it is the patches that fill a pack."""
    planners = {name: new_planner(10**7, packing=name) for name in ("pool", "task", "single")}
    if cost is not None:
        planners["balanced"] = new_planner(10**7, cost)
    pictures = SimulatedSource("pictures", 10**7, "picture")
    bound = PlanConfig(max_patches=MAX_TOKENS)
    small = MediaConfig(max_pixels=1024 * 784)
    planners["pool, patches bind"] = Planner([pictures], [Phase(0, (1.0,))], small, bound, seed=0)
    return {name: us_per_sample(planner) for name, planner in planners.items()}


def planner_mb(num_samples: int, packs: int = 500) -> float:
    """MB that a planner of so many samples holds at its peak, without the simulated tables."""
    sources, weights = mixed_sources(num_samples)
    phases = [Phase(0, tuple(weights))]
    warm_up(Planner(sources, phases, MEDIA, PlanConfig(), seed=0))
    tracemalloc.start()
    planner = Planner(sources, phases, MEDIA, PlanConfig(), seed=0)
    for _ in range(packs):
        planner.next_pack()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def new_short_planner(num_samples: int) -> Planner:
    """A planner of short texts alone, about 340 a pack: the most work that a pack can be."""
    source = SimulatedSource("short", num_samples, "short")
    return Planner([source], [Phase(0, (1.0,))], MEDIA, PlanConfig(), seed=0)


def warm_up(planner: Planner, samples: int = 40_000) -> None:
    """Make the simulated tables that the next blocks need, so that only the planner's own work is timed."""
    state = planner.state_dict()
    done = 0
    while done < samples:
        done += len(planner.next_pack().items)
    planner.load_state_dict(state)


def fill_of(lengths: np.ndarray, pool: int = 256) -> np.ndarray:
    """Fill of each pack of the pool packer."""
    packer = PoolPacker(MAX_TOKENS, 1 << 40, pool)
    source = iter([Item(0, 0, 0, 0, int(n), 0) for n in lengths])
    fills = []
    try:
        while True:
            fills.append(sum(item.tokens for item in packer.next_pack(source)) / MAX_TOKENS)
    except StopIteration:
        return np.array(fills)


def next_fit(lengths: np.ndarray) -> float:
    used, packs, room = 0, 1, MAX_TOKENS
    for n in lengths.tolist():
        if n > room:
            packs, room = packs + 1, MAX_TOKENS
        room -= n
        used += n
    return used / (packs * MAX_TOKENS)


def first_fit_decreasing(lengths: np.ndarray, window: int) -> float:
    packs = 0
    for begin in range(0, len(lengths), window):
        rooms: list[int] = []
        for n in sorted(lengths[begin : begin + window].tolist(), reverse=True):
            place = next((i for i, room in enumerate(rooms) if room >= n), None)
            if place is None:
                rooms.append(MAX_TOKENS - n)
            else:
                rooms[place] -= n
        packs += len(rooms)
    return float(lengths.sum()) / (packs * MAX_TOKENS)


def best_fit_offline(lengths: np.ndarray) -> float:
    """Best fit decreasing over all samples at once: what no online packer can know."""
    rooms: list[int] = []
    for n in sorted(lengths.tolist(), reverse=True):
        place = bisect.bisect_left(rooms, n)
        room = rooms.pop(place) if place < len(rooms) else MAX_TOKENS
        bisect.insort(rooms, room - n)
    return float(lengths.sum()) / (len(rooms) * MAX_TOKENS)


def fills() -> dict[str, dict[str, float]]:
    """Fill by diet: ours, the offline bound, next-fit, first-fit-decreasing."""
    found = {}
    for name, diet in DIETS.items():
        rng = np.random.default_rng(0)
        lengths = np.clip(diet(rng, 20_000), 8, MAX_TOKENS).astype(int)
        ours = fill_of(lengths)
        found[name] = {
            "ours": float(ours.mean()),
            "under_98": float((ours < 0.98).mean()),
            "offline": best_fit_offline(lengths),
            "next_fit": next_fit(lengths),
            "ffd_100": first_fit_decreasing(lengths, 100),
        }
    return found


def resume(num_samples: int) -> tuple[float, int]:
    """Seconds to continue in the middle of an epoch, and bytes of the state."""
    planner = new_planner(num_samples)
    while min(planner.state_dict()["drawn"]) < 500:
        planner.next_pack()
    text = json.dumps(planner.state_dict())
    times = []
    for _ in range(3):
        other = new_planner(num_samples)
        warm_up_first = time.process_time()
        other.load_state_dict(json.loads(text))
        other.next_pack()
        times.append(time.process_time() - warm_up_first)
    assert other.state_dict()["number"] == planner.state_dict()["number"] + 1
    return statistics.median(times), len(text)


def imbalances(cost: PackCost, ranks: int = 256, steps: int = 8) -> dict[str, float]:
    """Slowest over mean at 256 ranks by accumulation, the mean of `steps` steps: one alone strays by a tenth.

    "plain 4": in plan order; "sorted 4": the same packs ordered by cost; "balanced 4": packs made to a cost, ordered.
    """
    planner, balanced, found = new_planner(10**7), new_planner(10**7, cost), {}
    for accumulation in (1, 4, 8, 16):
        values: dict[str, list[float]] = {"plain": [], "sorted": [], "balanced": []}
        for _ in range(steps):
            packs, alike = ([make.next_pack() for _ in range(ranks * accumulation)] for make in (planner, balanced))
            ways = {"plain": packs, "sorted": order_by_cost(packs, cost), "balanced": order_by_cost(alike, cost)}
            for name, ordered in ways.items():
                costs = np.array([cost.pack(pack) for pack in ordered]).reshape(accumulation, ranks)
                values[name].append(imbalance(costs))
        found |= {f"{name} {accumulation}": statistics.mean(list_) for name, list_ in values.items()}
    return found


def seconds_per_step(ranks: int = 1024, steps: int = 3, short: bool = False) -> float:
    """CPU seconds to plan one step of one pack a rank, of the mixed lengths or of short texts."""
    planner = new_short_planner(10**8) if short else new_planner(10**8)
    warm_up(planner, 400_000 if short else 40_000)
    planned = planned_steps(planner, ranks)
    times = []
    for _ in range(steps):
        start = time.process_time()
        next(planned)
        times.append(time.process_time() - start)
    return statistics.median(times)


def main_seconds_per_step(ranks: int = 1024, steps: int = 8) -> float:
    """CPU seconds of the training process for the plan of one step of short texts, which another process makes."""
    planner = new_short_planner(10**8)
    warm_up(planner, 400_000)

    def steps_behind(state: dict[str, Any]) -> Iterator[PlannedStep]:
        planner.load_state_dict(state)
        return planned_steps(planner, ranks)

    process = PlanProcess(steps_behind, planner.state_dict(), stall_s=600)
    times = []
    for _ in range(steps):
        start = time.process_time()
        while process.take() is None:
            process.feed.wait()
        times.append(time.process_time() - start)
    process.close()
    return statistics.median(times)


def planned_steps(planner: Planner, ranks: int) -> Iterator[PlannedStep]:
    """Steps of one pack a rank, as rank 0 gets them."""
    while True:
        first, *_ = [planner.next_pack() for _ in range(ranks)]
        yield PlannedStep((first,), planner.state_dict())
