"""The process group: who this rank is, and the few collectives the trainer needs besides DeepSpeed's own.

Enters: the environment that torchrun, deepspeed or SLURM set. Leaves: a `World`. A process started without a launcher
becomes a world of one.
"""

from __future__ import annotations

import gc
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from data_pipelines.errors import UserError
from qwen2vl_train.training.launcher import Launcher, find_launcher
from qwen2vl_train.training.meeting import Meeting
from qwen2vl_train.training.restart import is_restart

T = TypeVar("T")


class AgreedError(UserError):
    """One that every rank raises alike, at the same place: collectives can still follow."""


@dataclass(frozen=True)
class World:
    """This process among `size`: its `rank`, its `local_rank` on the node, its device; `start` names this start.

    torchrun's own count of restarts does not: a node whose torchrun was started again counts from 0. `restarted`: any
    rank's launcher started it again by itself. `launcher`: the process that answers for this rank, if there is one.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    start: str = ""
    restarted: bool = False
    launcher: Launcher | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def hosts_store(self) -> bool:
        """Whether the rendezvous store lives in this process, and ends with it; torchrun's agent holds it else."""
        return self.is_main and self.size > 1 and not _has_agent_store()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce `tensor` in place over all ranks."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, item: Any) -> list[Any]:
        """Every rank's `item`, on every rank, in rank order (pickled: small host objects only)."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and give its result to all; its exception is raised on every rank.

        Without the second half, ranks that wait for a rank that failed would hang until the group's timeout.
        """
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [(True, make())]
            except Exception as error:
                answer = [(False, error)]
        dist.broadcast_object_list(answer, src=0)
        succeeded, value = answer[0]
        if not succeeded:
            raise value
        return value  # type: ignore[no-any-return]

    def connect_store(self, prefix: str) -> Store:
        """A connection of its own to the rendezvous store, for another thread than the main one.

        Keys of an earlier start under `torchrun --max-restarts` are not seen.
        """
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, timeout=timedelta(seconds=20), wait_for_workers=False)
        return PrefixStore(f"qwen2vl/{self.start}/{prefix}", store)


def start_world(timeout_s: float, meeting_s: float = 600.0) -> World:
    """Join the process group (NCCL on CUDA, gloo on CPU) and say which device is this rank's.

    `timeout_s` bounds every collective: a rank that never arrives ends the run instead of hanging it; `meeting_s` the
    time until all ranks have met.

    Raises:
        UserError: more ranks on this machine than GPUs, or the ranks cannot meet (a port in use, a wrong address, a
            node that does not come).
    """
    launcher = find_launcher()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    rank, size, local_rank, port = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank}, and this machine shows {torch.cuda.device_count()} GPU(s): start one rank "
                "for each (--nproc-per-node, --num_gpus, --ntasks-per-node), or look at CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(device)
    limit, names, address = timedelta(seconds=timeout_s), f"start{_local_restarts()}", os.environ["MASTER_ADDR"]
    with Meeting(rank, size, local_rank, address, port, names, meeting_s, launcher) as meeting:
        try:
            hosts = rank == 0 and not _has_agent_store()
            patience = timedelta(seconds=meeting_s)
            # as rendezvous("env://") makes it, but rank 0 does not wait here, where it could not say for whom
            server = TCPStore(address, port, None, hosts, patience, wait_for_workers=False, multi_tenant=hosts)
            store = PrefixStore(names, server)
            meeting.wait_for_all(store)
            store.set_timeout(limit)
            dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, store=store, rank=rank, world_size=size)
        except dist.DistError as error:
            waited = f"; waited {meeting_s:g} s (engine.meeting_s) {meeting.describe()}" if meeting.is_over else ""
            raise UserError(
                f"the ranks cannot meet at MASTER_ADDR={address} MASTER_PORT={port} ({str(error).splitlines()[0]})"
                f"{waited}; choose a free port and an address of rank 0's machine that all reach"
            ) from error
        starts: list[Any] = [None] * size
        dist.all_gather_object(starts, (secrets.token_hex(4), is_restart()))
    restarted = any(again for _, again in starts)
    return World(rank, size, local_rank, device, starts[0][0], restarted, launcher)


def _has_agent_store() -> bool:
    """Whether torchrun's agent holds the store where the ranks meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _local_restarts() -> str:
    """How often torchrun has started the ranks again, where that is known to be one number: on a single machine.

    Its store outlives them, and ranks that met under the same names would read the addresses of their predecessors
    (PyTorch 2.13, with any program under --max-restarts). Agents of several machines may count differently.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if one_machine else ""


def end_world() -> None:
    """Leave the group, whose threads end with the last reference to it: to be called when engines are closed and gone.

    A gloo thread that still holds a tensor when the interpreter ends aborts the process: without this, about one run in
    four did (measured).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
