"""What must be right before the first step, looked at on every rank and shown as one table.

Enters: the run's configuration and world. Leaves: a table (host, device, versions, clock, disk, shards, network), or an
error that lists what differs or is missing; a warning where the disk is too small for what the run will write. Costs
one gathering, a look at the size of each shard and of the folders to start from, and a timed all-reduce.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from rich.table import Table

from data_pipelines.config import RemoteConfig
from data_pipelines.shards.names import file_of
from data_pipelines.shards.storage import expand_shards
from data_pipelines.whole import write_whole
from qwen2vl_train.config import ConfigError, RunConfig
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.cost import parameter_counts
from qwen2vl_train.training.world import World

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "webdataset", "numpy")
_MAX_SKEW_S = 30.0
_PROBE_BYTES = 8 << 20
_LATE_S = 5.0


@dataclass(frozen=True)
class RankFacts:
    """What one rank sees. `versions` by package; `shards`: stage -> (shards, their bytes) or a message; sizes in GB.

    `run_dir`: whether it is the folder that rank 0 has. `later`: key and value of the configuration -> the files there
    that are first read when training has begun, in words.
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
    later: dict[str, str] = field(default_factory=dict)


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
        faults += [
            f"{who} sees for {key}: {found}; rank 0 ({first.host}): {first.later[key]}. Share the folder"
            for key, found in facts.later.items()
            if found != first.later[key]
        ]
        if abs(facts.clock_s - first.clock_s) > _MAX_SKEW_S:
            faults.append(f"{who}: its clock is {facts.clock_s - first.clock_s:+.0f} s off rank 0's; set it")
        if not facts.run_dir:
            faults.append(
                f"{who} has another run_dir than rank 0 ({first.host}), whose new file it does not see: choose a "
                "run_dir on a file system that all nodes share"
            )
    return faults


def find_lack_of_room(run: RunConfig, config: ModelConfig) -> str | None:
    """Why the disk of `run_dir` is too small for one checkpoint and one export, where it is; `config` is the model's.

    Before the first step, since the first checkpoint may be due in hours.
    """
    counts, width = parameter_counts(config), 2 if run.engine.precision == "bf16" else 4
    kept = max(  # the weights, and of what trains float32 master weights and two moments
        sum(count * (width + 12 * (part in run.stages[name].trainable)) for part, count in counts.items())
        for name in run.chain
    )
    export = sum(counts.values()) * (2 if run.export_dtype == "bfloat16" else 4)
    free = shutil.disk_usage(_existing(run)).free
    if free >= kept + export + run.checkpoint.min_free_gb * 1e9:
        return None
    return (
        f"run_dir={run.run_dir} has {free / 1e9:.1f} GB free: too little for a checkpoint (about {kept / 1e9:.1f} GB), "
        f"an export ({export / 1e9:.1f} GB) and checkpoint.min_free_gb={run.checkpoint.min_free_gb:g}, so checkpoints "
        "will be left out; make room, or choose a run_dir on another disk"
    )


def _existing(run: RunConfig) -> Path:
    """`run_dir`, or what is there of the way to it."""
    wanted = Path(run.run_dir).resolve()
    return next(path for path in (wanted, *wanted.parents) if path.exists())


def _look(run: RunConfig, world: World, mark: Path) -> RankFacts:
    cuda = world.device.type == "cuda"
    memory = torch.cuda.get_device_properties(world.device).total_memory if cuda else _host_memory()
    return RankFacts(
        rank=world.rank,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name(world.device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        clock_s=time.time(),
        free_gb=shutil.disk_usage(_existing(run)).free / 1e9,
        memory_gb=memory / 1e9,
        shards={stage: _shards(run, stage) for stage in run.chain},
        run_dir=_appears(mark),
        later=_later(run),
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
    data = run.stages[stage].data
    return _weigh({name: source.shards for name, source in data.sources.items()}, data.remote)


def _later(run: RunConfig) -> dict[str, str]:
    """Tokenizer, initial weights and held-out shards, as this rank sees them."""
    found = {f"data.tokenizer={run.data.tokenizer}": _weigh_files(Path(run.data.tokenizer), "tokenizer.json")}
    for name in run.chain:
        init = run.stages[name].init_from
        if init not in ("previous", "scratch"):
            found[f"stages.{name}.init_from={init}"] = _weigh_files(Path(init), "config.json", "*.safetensors")
    scored = [run.stages[name].data for name in run.chain if run.stages[name].evaluate]
    for task, shards in run.data.heldout.items():
        if scored:
            found[f"data.heldout.{task}={shards}"] = _weigh({task: (shards,)}, scored[0].remote)
    return found


def _weigh(sources: Mapping[str, Sequence[str]], remote: RemoteConfig) -> str:
    try:
        paths = [path for name, shards in sources.items() for path in expand_shards(name, tuple(shards), remote)]
        size = sum(Path(file_of(path)).stat().st_size for path in paths if "://" not in path)
    except (ValueError, OSError) as error:
        return str(error)
    return f"{len(paths)} shards, {size:,} bytes"


def _weigh_files(folder: Path, *forms: str) -> str:
    try:
        sizes = [path.stat().st_size for form in forms for path in folder.glob(form)]
    except OSError as error:
        return str(error)
    return f"{len(sizes)} files, {sum(sizes):,} bytes"


def _time_all_reduce(world: World) -> str:
    """How long an all-reduce takes: of one number, and of 8 MiB."""
    small, large = (torch.zeros(size, device=world.device) for size in (1, _PROBE_BYTES // 4))
    seconds = []
    for tensor in (small, small, large):  # the first one opens the connections
        start = time.perf_counter()
        world.sum(tensor)
        float(tensor[0])  # CUDA: wait for it
        seconds.append(time.perf_counter() - start)
    return f"over {dist.get_backend()}: all-reduce {seconds[1] * 1e3:.2f} ms, of 8 MiB {seconds[2] * 1e3:.1f} ms"


def _table(everyone: Sequence[RankFacts], network: str) -> Table:
    """A row per host: what its ranks share."""
    first = everyone[0]
    versions = ", ".join(f"{name} {found}" for name, found in first.versions.items())
    shards = "; ".join(f"{stage}: {found}" for stage, found in first.shards.items())
    table = Table(title=f"{len(everyone)} rank(s) {network}", caption=f"{versions}\n{shards}", title_justify="left")
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
