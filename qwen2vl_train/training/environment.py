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
from data_pipelines.whole import write_whole
from qwen2vl_train.config import ConfigError, RunConfig
from qwen2vl_train.training.world import World

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "webdataset", "numpy")
_MAX_SKEW_S = 30.0
_PROBE_BYTES = 8 << 20
_LATE_S = 5.0


@dataclass(frozen=True)
class RankFacts:
    """What one rank sees. `versions` by package; `shards`: stage -> (shards, their bytes) or a message; sizes in GB.

    `run_dir`: whether it is the folder that rank 0 has.
    """

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    clock_s: float
    free_gb: float
    memory_gb: float
    shards: dict[str, str]
    run_dir: bool = True


def check_environment(run: RunConfig, world: World) -> Table:
    """Look around on every rank and compare. Collective; the table is the same on all ranks.

    Raises:
        ConfigError: ranks differ in versions or in the files that they see, or a clock is off; all faults at once.
    """
    mark = Path(run.run_dir) / f".start-{world.start}"  # a name that no node has looked up before and remembers
    world.from_main(lambda: write_whole(mark, ""))  # here the ranks meet, so the clocks are read at about the same time
    try:
        everyone: list[RankFacts] = world.gather(_look(run, world, mark))
    finally:
        if world.is_main:
            mark.unlink(missing_ok=True)
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
        if not facts.run_dir:
            faults.append(
                f"{who} has another run_dir than rank 0 ({first.host}), whose new file it does not see: choose a "
                "run_dir on a file system that all nodes share"
            )
    return faults


def _look(run: RunConfig, world: World, mark: Path) -> RankFacts:
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
        run_dir=_appears(mark),
    )


def _appears(path: Path) -> bool:
    """Whether the file is there, or comes within a while: some network file systems tell other nodes late."""
    deadline = time.monotonic() + _LATE_S
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


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
