"""DeepSpeed behind one small class: the only file that imports it.

Enters: a model, its optimizer, `EngineConfig`. Leaves: `Engine` with forward, backward, step, norm, state on disk and
full tensors for export. Under ZeRO-3 every rank holds 1/world of each parameter; a module's weights exist only during
its forward, so every rank must run the same modules in the same order.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.errors import UserError
from data_pipelines.samples import PackedBatch
from qwen2vl_train.config import EngineConfig, OptimConfig
from qwen2vl_train.model.head import LossOutput
from qwen2vl_train.model.language import DecoderLayer
from qwen2vl_train.model.vision import VisionBlock
from qwen2vl_train.model.weights import fill
from qwen2vl_train.training.frozen import FrozenParts
from qwen2vl_train.training.optim import build_optimizer
from qwen2vl_train.training.universal import padding_passed_over, separate_steps
from qwen2vl_train.training.world import World

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

import deepspeed  # noqa: E402  (its accelerator is chosen by the environment at import)
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save  # noqa: E402
from deepspeed.runtime.zero import parameter_offload  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402


@contextmanager
def building(config: EngineConfig, world: World) -> Iterator[None]:
    """Parameters made inside are partitioned at once under ZeRO-3: no rank ever holds the whole model.

    Fill them with `qwen2vl_train.model.weights.load`, which reads this rank's share only.
    """
    if config.zero_stage < 3:
        yield
        return
    _attach(world)
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config, 1.0, 1, world.device.type == "cuda")):
        yield


class Engine:
    """A model under DeepSpeed. `device` is where batches must be."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        config: EngineConfig,
        world: World,
        accumulation: int,
    ) -> None:
        """Partition `model` (built alike on every rank, or already partitioned) and its optimizer over the ranks.

        `accumulation` is the number of micro-steps per update.
        """
        _attach(world)
        if config.zero_stage == 3:
            # One gather per block instead of one per linear layer: eager steps are 8 to 14% faster (measured).
            set_z3_leaf_modules(model, [VisionBlock, DecoderLayer])
        self.device = world.device
        self._world = world
        self._zero_stage = config.zero_stage
        self._precision = config.precision
        self._clip_norm = optim.clip_norm
        self._whole_norm: Tensor | None = None
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(groups, optim),
            config=deepspeed_config(config, optim.clip_norm, accumulation, world.device.type == "cuda"),
            dist_init_required=False,
        )

    def __call__(self, batch: PackedBatch) -> LossOutput:
        """Forward of one pack: the summed loss and each supervised token's loss."""
        output: LossOutput = self._engine(batch)
        return output

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, which must already hold the factor world / global label count.

        DeepSpeed averages over ranks; `scale_wrt_gas=False` keeps it from dividing by the micro-steps as well.
        """
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """End a micro-step; at the last one of an update, clip by the global norm and update.

        Gradients that are not finite leave parameters and optimizer state as they are: see `skipped`.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        if last and self._zero_stage == 0:
            self._finish_whole_gradients()
        self._engine.step()
        if last and self._zero_stage in (1, 2) and self.skipped:
            # With an offloaded bf16 optimizer DeepSpeed (0.19.8) keeps them and adds all later ones to them.
            for group in getattr(self._optimizer, "averaged_gradients", {}):
                self._optimizer.averaged_gradients[group] = None

    def _finish_whole_gradients(self) -> None:
        """Clip the (reduced, unpartitioned) gradients of stage 0, where DeepSpeed keeps no norm and checks nothing."""
        parameters = [parameter for parameter in self._engine.module.parameters() if parameter.grad is not None]
        limit = self._clip_norm or float("inf")
        self._whole_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not torch.isfinite(self._whole_norm):
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over parameters without a gradient
            self._whole_norm = torch.full_like(self._whole_norm, float("inf"))

    @property
    def skipped(self) -> bool:
        """The last update was left out on every rank because its gradient norm was not finite.

        Costs nothing: DeepSpeed brings the norm's verdict to the host once per update before it touches a parameter
        (that one synchronisation per update is its own), and the norm is of all ranks, so all ranks agree.
        """
        if self._zero_stage == 0:
            return self._whole_norm is not None and math.isinf(self._whole_norm)
        return bool(self._engine.optimizer.overflow)

    def gradient_norm(self) -> float:
        """Global L2 norm of the last update's gradients before clipping; infinite when the update was skipped."""
        norm = self._whole_norm if self._zero_stage == 0 else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def set_rates(self, factor: float) -> None:
        """Set each group's learning rate to `factor` times its peak."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def rates(self) -> dict[str, float]:
        """Learning rate by group name."""
        return {group["name"]: float(group["lr"]) for group in self._engine.optimizer.param_groups}

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.bfloat16 if self._precision == "bf16" else torch.float32

    @property
    def signature(self) -> str:
        """What a checkpoint must have been written with to fit: it decides which tensors the files hold."""
        return f"zero_stage={self._zero_stage} precision={self._precision}"

    @property
    def partitioned(self) -> bool:
        """What a rank's checkpoint files hold depends on the number of ranks."""
        return self._zero_stage > 0

    def checkpoint_bytes(self) -> int:
        """About what `save` writes over all ranks: the model, float32 master weights and two moments."""
        parameters = list(self._engine.module.parameters())
        counts = [(int(getattr(item, "ds_numel", item.numel())), item.requires_grad) for item in parameters]
        width = 2 if self._precision == "bf16" else 4
        return sum(count * (width + 12 * trains) for count, trains in counts)

    def save(self, folder: Path) -> None:
        """Every rank writes its shard of parameters and optimizer state under `folder`/engine. Collective."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def snapshot(self, folder: Path) -> list[Callable[[], None]]:
        """What `save` would write, held in host memory: calls that write it, from any thread. Collective.

        DeepSpeed's own writers that run aside (0.19.8) do not serve: the decoupled one sends the live state to another
        process and waits for it before the next update, and, like the fast one, it needs libaio and a compiler;
        DataStates is a package apart. So the state is copied here where DeepSpeed would write it.
        """
        writer = self._engine.checkpoint_engine
        write = writer.save
        held: list[Callable[[], None]] = []

        def hold(state_dict: dict[str, Any], path: str) -> None:
            held.append(partial(write, clone_tensors_for_torch_save(state_dict), path))

        writer.save = hold
        try:
            self.save(folder)
        finally:
            writer.save = write
        return held

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote at the same world size (stage 0, which partitions nothing: at any). Collective.

        Parameters, moments and counts of updates are the checkpoint's; learning rates, weight decay, betas, epsilon and
        the norm to clip by are this run's, where DeepSpeed would bring back those that the checkpoint was written with.
        """
        groups = self._engine.basic_optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="engine", load_lr_scheduler_states=False)
        if loaded is None:
            raise UserError(f"{folder}: DeepSpeed found no checkpoint in it; name another one with resume=PATH")
        for group, kept in zip(self._engine.basic_optimizer.param_groups, settings, strict=True):
            group.update(kept)
        if self._zero_stage > 0:
            self._optimizer.clip_grad = self._clip_norm

    def load_universal(self, folder: Path, written: Path) -> None:
        """Restore a universal checkpoint under `folder`/engine, converted from the one in `written`. Collective.

        Mends what DeepSpeed 0.19.8 does wrong: it gives every group the first group's settings (see `load`) and the
        same `step`, and fails at a group of nothing but padding (see `universal`). Frozen parameters are not in a
        universal checkpoint and would keep the values that the model was built with: they come from `written`.
        """
        self._engine._config.load_universal_checkpoint = True
        try:
            with padding_passed_over(self._optimizer):
                self.load(folder)
        finally:
            self._engine._config.load_universal_checkpoint = False
        separate_steps(self._engine.basic_optimizer)
        named = self._engine.module.named_parameters()
        frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
        if not frozen:
            return
        if self._zero_stage == 3:
            self._optimizer.checkpoint_event_prologue()  # partitions what is kept whole on every rank
        fill(frozen, FrozenParts(written / "engine"), self._world.rank)
        if self._zero_stage == 3:
            self._optimizer.checkpoint_event_epilogue()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and full value, one at a time (a host copy on rank 0; empty elsewhere). Collective.

        Rank 0 holds one gathered tensor beside its partition, never the whole model.
        """
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                value = parameter.detach().to("cpu", copy=True) if self._world.is_main else torch.empty(0)
            yield name, value

    def close(self) -> None:
        """Let go of model, optimizer state and DeepSpeed's process group, so that the next stage has their memory.

        DeepSpeed's own `destroy` (0.19.8) leaves the model in a list and in a function's cache: without the rest, each
        stage of a chain kept the memory of all earlier ones, and gloo's threads ran on when the interpreter ended.
        """
        engine = self._engine
        del self._engine, self._optimizer
        engine.destroy()
        own = {engine.data_parallel_group, engine.seq_data_parallel_group} - {dist.group.WORLD}
        del engine
        parameter_offload.FWD_MODULE_STACK.clear()
        cached = "_PartitionedParameterCoordinator__params_to_release"
        if release := getattr(PartitionedParameterCoordinator, cached, None):
            inspect.getclosurevars(release).nonlocals["func"].cache_clear()
        gc.collect()  # what is left refers to itself in circles
        for group in own:
            deepspeed.comm.destroy_process_group(group)


def _attach(world: World) -> None:
    """Attach DeepSpeed to the process group without its banner and without compiling anything."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # The shared-memory collectives need a compiler and 26 s at first use, and trained no faster (measured).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)


def deepspeed_config(config: EngineConfig, clip_norm: float, accumulation: int, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's JSON configuration for our settings; `accumulation` counts micro-steps per update.

    Gradients are accumulated and communicated in float32 under bf16: either alone leaves a relative gradient error near
    2e-3, both together 4e-10 (measured).
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlap_comm and cuda,
        "reduce_bucket_size": config.reduce_bucket_size,
        "contiguous_gradients": True,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.param_persistence_threshold,
            "stage3_prefetch_bucket_size": config.prefetch_bucket_size,
            "stage3_max_live_parameters": config.max_live_parameters,
        }
    if config.offload_optimizer and config.zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,  # one pack
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm if config.zero_stage > 0 else 0.0,  # stage 0: Engine.step clips
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
    }
