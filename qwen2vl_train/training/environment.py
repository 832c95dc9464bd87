"""What must be right before the first step, looked at on every rank and shown as one table.

Enters: the run's configuration and world. Leaves: a table (host, device, versions, clock, disk, shards, network), or an
error that lists what differs or is missing. Costs one gathering, a look at each shard's size, and a timed all-reduce.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from data_pipelines.shards.names import file_of
from data_pipelines.shards.storage import expand_shards
from qwen2vl_train.config import ConfigError, RunConfig
from qwen2vl_train.training.world import World

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "webdataset", "numpy")
_MAX_SKEW_S = 30.0
_PROBE_BYTES = 8 << 20


@dataclass(frozen=True)
class RankFacts:
    """What one rank sees. `versions` by package; `shards`: stage -> (shards, their bytes) or a message; sizes in GB."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    clock_s: float
    free_gb: float
    memory_gb: float
    shards: dict[str, str]


def check_environment(run: RunConfig, world: World) -> Table:
    """Look around on every rank and compare. Collective; the table is the same on all ranks.

    Raises:
        ConfigError: ranks differ in versions or in the shards that they see, or a clock is off; all faults at once.
    """
    world.barrier()  # so that the clocks are read at about the same time
    everyone: list[RankFacts] = world.gather(_look(run, world))
    network = _time_all_reduce(world)
    faults = find_faults(everyone)
    if faults:
        raise ConfigError("the ranks cannot train together:\n  " + "\n  ".join(faults))
    return _table(everyone, network)


def find_faults(everyone: Sequence[RankFacts]) -> list[str]:
    """What keeps these ranks from training together, one line each."""
    first = everyone[0]
    faults = []
    for facts in everyone:
        who = f"rank {facts.rank} ({facts.host})"
        faults += [
            f"{who} has {name} {found}, rank 0 ({first.host}) {first.versions[name]}: install the same"
            for name, found in facts.versions.items()
            if found != first.versions[name]
        ]
        faults += [
            f"{who} sees for stage {stage}: {found}; rank 0 ({first.host}): {first.shards[stage]}. Share the folder"
            for stage, found in facts.shards.items()
            if found != first.shards[stage]
        ]
        if abs(facts.clock_s - first.clock_s) > _MAX_SKEW_S:
            faults.append(f"{who}: its clock is {facts.clock_s - first.clock_s:+.0f} s off rank 0's; set it")
    return faults


def _look(run: RunConfig, world: World) -> RankFacts:
    wanted = Path(run.run_dir).resolve()
    existing = next(path for path in (wanted, *wanted.parents) if path.exists())
    cuda = world.device.type == "cuda"
    memory = torch.cuda.get_device_properties(world.device).total_memory if cuda else _host_memory()
    return RankFacts(
        rank=world.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(world.device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        clock_s=time.time(),
        free_gb=shutil.disk_usage(existing).free / 1e9,
        memory_gb=memory / 1e9,
        shards={stage: _shards(run, stage) for stage in run.chain},
    )


def _shards(run: RunConfig, stage: str) -> str:
    """How many shards, and of how many bytes, this rank sees for `stage`; remote shards are counted only."""
    try:
        data = run.stages[stage].data
        paths = [path for name, item in data.sources.items() for path in expand_shards(name, item.shards, data.remote)]
        local = [Path(file_of(path)) for path in paths if "://" not in path]
        size = sum(path.stat().st_size for path in local)
    except (ValueError, OSError) as error:
        return str(error)
    return f"{len(paths)} shards, {size:,} bytes"


def _time_all_reduce(world: World) -> str:
    """How long an all-reduce takes: of one number, and of 8 MiB."""
    small, large = (torch.zeros(size, device=world.device) for size in (1, _PROBE_BYTES // 4))
    seconds = []
    for tensor in (small, small, large):  # the first one opens the connections
        start = time.perf_counter()
        world.sum(tensor)
        float(tensor[0])  # CUDA: wait for it
        seconds.append(time.perf_counter() - start)
    return f"all-reduce {seconds[1] * 1e3:.2f} ms, of 8 MiB {seconds[2] * 1e3:.1f} ms"


def _table(everyone: Sequence[RankFacts], network: str) -> Table:
    """A row per host: what its ranks share."""
    first = everyone[0]
    versions = ", ".join(f"{name} {found}" for name, found in first.versions.items())
    shards = "; ".join(f"{stage}: {found}" for stage, found in first.shards.items())
    table = Table(title=f"{len(everyone)} rank(s), {network}", caption=f"{versions}\n{shards}", title_justify="left")
    for heading in ("host", "ranks", "device", "memory", "free disk", "clock"):
        table.add_column(heading)
    for host in dict.fromkeys(facts.host for facts in everyone):
        there = [facts for facts in everyone if facts.host == host]
        one = there[0]
        table.add_row(
            host,
            ", ".join(str(facts.rank) for facts in there),
            ", ".join(dict.fromkeys(facts.device for facts in there)),
            f"{one.memory_gb:.0f} GB",
            f"{one.free_gb:.0f} GB",
            f"{one.clock_s - first.clock_s:+.1f} s",
        )
    return table


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
