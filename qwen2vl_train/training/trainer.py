"""One stage of training: build, resume, loop, leave an export behind.

Enters: a validated configuration, the stage's name and the weights to start from. Leaves: a Hugging Face folder and the
stage's figures. The loop is `Trainer.fit`; everything it calls per step is in `step.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from data_pipelines.errors import UserError
from data_pipelines.ledger import Ledger
from data_pipelines.loader import PackLoader
from data_pipelines.samples import PackedBatch
from data_pipelines.streaming import StreamLoader
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import ConfigError, RunConfig, StageConfig
from qwen2vl_train.export import ExportError, export_model
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.model.parts import audit, format_audit, freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise, load_hf
from qwen2vl_train.start import refuse_other_tensors
from qwen2vl_train.training.ahead import DeviceFeed
from qwen2vl_train.training.balancing import pack_cost, write_pack_cost
from qwen2vl_train.training.checkpoint import CheckpointError, CheckpointStore
from qwen2vl_train.training.engine import Engine, building
from qwen2vl_train.training.guard import Guard
from qwen2vl_train.training.journal import Journal
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.optim import parameter_groups
from qwen2vl_train.training.records import add_change, forget_packs, take_changes
from qwen2vl_train.training.schedule import rate_factor
from qwen2vl_train.training.sequence import SequenceGroup
from qwen2vl_train.training.spikes import Spike, SpikeGuard
from qwen2vl_train.training.step import train_step
from qwen2vl_train.training.stopping import EXIT_UNSAVED, UNSAVED, Preempted, StopRequest
from qwen2vl_train.training.watchdog import Watchdog
from qwen2vl_train.training.window import Progress
from qwen2vl_train.training.world import AgreedError, World

Loader = PackLoader | StreamLoader


class Trainer:
    """Trains `stage_name` from the weights in `init` (a folder, or None for seeded random weights)."""

    def __init__(
        self,
        run: RunConfig,
        stage_name: str,
        init: Path | None,
        model_config: ModelConfig,
        world: World,
        monitor: Monitor,
        resume: str = "auto",
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare the stage; `resume` as in the configuration, for this stage.

        `origin` (settings, revision) is kept in every checkpoint.
        """
        self._run = run
        self._name = stage_name
        self._stage: StageConfig = run.stages[stage_name]
        self._init = init
        self._model_config = model_config
        self._world = world
        self._monitor = monitor
        self._resume_from = resume
        self._origin = dict(origin or {})
        self._folder = Path(run.run_dir) / stage_name
        self._tokenizer = TextTokenizer(run.data.tokenizer)
        share = run.engine.sequence_parallel
        self._sequence = SequenceGroup.form(world, share, model_config.text.num_attention_heads, run.engine.timeout_s)
        groups = self._sequence.data_size
        if self._stage.packs_per_step % groups:
            raise ConfigError(
                f"stages.{stage_name}.packs_per_step={self._stage.packs_per_step} is not a multiple of the world size "
                f"{world.size}{f' / engine.sequence_parallel={share}' if share > 1 else ''}: each rank takes the same "
                "number of packs; choose a multiple, or another number of ranks"
            )
        self._accumulation = self._stage.packs_per_step // groups

    def fit(self, stop: StopRequest, watchdog: Watchdog) -> tuple[Progress, bool]:
        """Train to the stage's last step, resuming where the newest checkpoint left, and export. Collective.

        Returns also whether the last step's checkpoint was written: the disk may have been full.

        Raises:
            Preempted: a signal asked to stop; the checkpoint of the step that was being done is written.
        """
        run, save_s = self._run, self._run.watchdog.save_s
        watchdog.note(f"building the model of {self._name}", limit_s=save_s)
        engine = self._build_engine()
        watchdog.note(f"opening the shards of {self._name}", limit_s=save_s)
        loader = self._open_loader()
        try:
            stop.obey(self._world, f"before the first step of {self._name}")
            watchdog.note(f"looking for a checkpoint of {self._name}", limit_s=save_s)
            store = CheckpointStore(self._folder / "checkpoints", run.checkpoint, self._world, self._monitor.warn)
            progress = self._resume(store, engine, loader)
            try:
                progress = self._train(engine, loader, store, progress, stop, watchdog)
            except AgreedError:
                watchdog.note(f"ending {self._name} with the checkpoint on its way", limit_s=save_s)
                self._publish_pending(store)
                raise
            kept = self._world.from_main(lambda: store.holds(progress.step))
            stop.obey(self._world, f"before the export of {self._name}", kept)
        except Preempted:
            engine.close()
            raise
        finally:
            self._monitor.stop_progress()
            loader.close()
        watchdog.note(f"exporting {self._name}", limit_s=save_s)
        self._export(engine, kept)
        engine.close()
        self._sequence.close()
        return progress, kept

    def _train(
        self,
        engine: Engine,
        loader: Loader,
        store: CheckpointStore,
        progress: Progress,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> Progress:
        """The loop: fetch, step, count, log, save."""
        stage, run, world = self._stage, self._run, self._world
        journal = Journal(
            stage, self._name, self._folder, self._model_config, loader.dataset_names, loader.shares, world,
            self._monitor,
        )  # fmt: skip
        ledger = Ledger(self._folder / f"ledger-rank{world.rank}.jsonl")
        guard = Guard(run.guard, self._folder, world, self._monitor.warn)
        spikes = SpikeGuard(run.guard, self._folder, world, self._monitor.warn)
        feed = DeviceFeed(world.device)
        unit = stage.packs_per_step * stage.data.plan.max_tokens if stage.tokens else 1
        engine.train()
        self._monitor.start_progress(f"{self._name:>10}", stage.length, progress.position(stage))
        # rank 0 always reads, and its loader's state is the one that is saved
        packs_of_steps = iter(loader) if self._sequence.reads else repeat([])
        while (position := progress.position(stage)) < stage.length:
            step = progress.step + 1
            watchdog.note(f"waiting for the packs of step {step}", loader.under_way)
            packs = journal.window.timed_next(packs_of_steps)
            engine.set_rates(rate_factor(position, stage.length, stage.schedule, unit))
            mine = self._sequence.deal(packs)
            watchdog.note(f"counting the labels of step {step}")
            result = train_step(engine, mine, journal.totals, world, stop.requested, watchdog.note_pack, feed)
            journal.count(packs)
            ledger.add(packs)
            progress.step = step
            progress.trained_tokens += result.tokens
            watchdog.note(f"bookkeeping of step {step}")
            guard.check(result, mine, progress)
            if spike := spikes.judge(result, progress):
                watchdog.note(f"going back from step {step}", limit_s=run.watchdog.save_s)
                if returned := self._roll_back(spike, mine, engine, store, spikes, journal, progress):
                    progress = returned
                    continue
            done = progress.position(stage) >= stage.length
            save = done or result.stop or (run.checkpoint.every and step % run.checkpoint.every == 0)
            if save or progress.step % run.monitor.log_every == 0 or progress.step == 1:
                journal.log(engine, progress)
                store.poll()
            if save:
                watchdog.note(f"writing the checkpoint of step {step}", limit_s=run.watchdog.save_s)
                path = store.save(engine, step, self._state(progress, loader), wait=done or result.stop)
                journal.window.reset()  # its time is not training time
                if result.stop and not done:
                    raise self._farewell(stop, progress.step, path)
        return progress

    def _export(self, engine: Engine, kept: bool) -> None:
        """Write the trained model; without a checkpoint of its last step (not `kept`), that alone saves the stage."""
        if not kept:
            self._monitor.warn(
                f"{self._name} is trained, but the checkpoint of its last step could not be written: should the export "
                "or the evaluation not come to its end, the steps since the checkpoint before are trained again"
            )
        try:
            export_model(
                engine.full_tensors(), self._model_config, self._tokenizer, self._stage.data.media,
                self._folder / "export", getattr(torch, self._run.export_dtype), self._world,
            )  # fmt: skip
        except ExportError as error:
            what = "does the export alone" if kept else "trains the steps since the last checkpoint again, too"
            raise ExportError(f"{error}, which {what}") from error

    def _publish_pending(self, store: CheckpointStore) -> None:
        """Bring a checkpoint that was being written to its end; the error that ends the run stays its cause."""
        try:
            store.finish()
        except (CheckpointError, OSError) as error:
            self._monitor.warn(str(error))

    def _roll_back(
        self,
        spike: Spike,
        packs: Sequence[PackedBatch],
        engine: Engine,
        store: CheckpointStore,
        spikes: SpikeGuard,
        journal: Journal,
        progress: Progress,
    ) -> Progress | None:
        """Model, optimizer and counts as in the last checkpoint; the loader stays behind the spike. Collective.
        None where no checkpoint lies before it: the step then counts as any other.
        """
        path = store.find("auto", before=spike.step)
        if path is None:
            spikes.record(spike, packs, None, progress.rollbacks)
            spikes.remember(spike.loss, progress)
            self._monitor.warn(f"{spike}; no checkpoint lies before it, so training goes on")
            return None
        state = store.load(engine, path)
        returned = progress.rolled_back(state["progress"])
        spikes.record(spike, packs, returned.step, returned.rollbacks)
        journal.discard()
        self._monitor.forget_after(self._name, returned.step)
        self._monitor.warn(
            f"{spike}; back to {path}, on with the packs after the spike (rollback {returned.rollbacks} of at most "
            f"{self._run.guard.max_rollbacks})"
        )
        return returned

    def _open_loader(self) -> Loader:
        """This rank's packs; those of a step are dealt by cost, so that ranks wait little for each other."""
        cost = pack_cost(self._model_config, self._stage.trainable)
        self._world.from_main(lambda: write_pack_cost(self._folder, cost))
        options = (
            self._stage.data, self._tokenizer, self._stage.packs_per_step, self._sequence.data_rank,
            self._sequence.data_size, self._run.seed, self._sequence.pin_memory,
        )  # fmt: skip
        if self._stage.data.reader == "webdataset":
            return StreamLoader(*options, cost=cost, gather=self._world.gather)  # ranks tell which shards are done
        return PackLoader(*options, cost=cost)

    def _state(self, progress: Progress, loader: Loader) -> dict[str, Any]:
        return {
            "stage": self._name,
            "progress": asdict(progress),
            "loader": loader.state_dict(),
            "model": asdict(self._model_config),
            **self._origin,
        }

    def _farewell(self, stop: StopRequest, step: int, path: Path | None) -> Preempted:
        stopped = f"{self._name} stopped after step {step} on {stop.reason}"
        if path is not None:
            return Preempted(f"{stopped}; its checkpoint is {path}; the same command continues")
        return Preempted(f"{stopped}; {UNSAVED}", EXIT_UNSAVED)

    def _build_engine(self) -> Engine:
        """The model with its parts frozen by rule; under ZeRO-3 each rank makes and fills its own share only."""
        settings = self._run.model
        with building(self._run.engine, self._world):
            model = Qwen2VL(
                self._model_config, settings.attention, settings.vision_checkpointing, settings.text_checkpointing,
                self._sequence.exchange,
            )  # fmt: skip
        if self._init is None:
            initialise(model, self._run.seed, rank=self._world.rank)
        else:
            try:
                load_hf(model, self._init, rank=self._world.rank)
            except UserError as error:
                raise UserError(f"stages.{self._name}.init_from: {error}") from error
        freeze(model, self._stage.trainable)
        parts = audit(model, self._stage.trainable)
        self._monitor.console.print(format_audit(parts), style="dim", highlight=False)
        counts = {
            part.part: {"trainable": part.trainable_parameters, "frozen": part.frozen_parameters} for part in parts
        }
        self._monitor.describe(self._name, "parameters", counts)
        groups = parameter_groups(model, self._stage.optim, self._model_config.vision.depth)
        engine = Engine(model, groups, self._stage.optim, self._run.engine, self._world, self._accumulation)
        if settings.compile != "none":
            model.compile_blocks(settings.compile)  # ZeRO-3 gathers around whole blocks: no hook lies inside
            said = f"  blocks are compiled by {settings.compile} as the first packs come"
            self._monitor.console.print(said, style="dim", highlight=False)
        return engine

    def _resume(self, store: CheckpointStore, engine: Engine, loader: Loader) -> Progress:
        if self._resume_from == "none":
            store.discard()
        path = None if self._resume_from == "none" else store.find(self._resume_from)
        if path is None:
            self._monitor.forget_after(self._name, -1)
            self._world.from_main(lambda: forget_packs(self._folder, None))
            return Progress()
        self._world.from_main(lambda: refuse_other_tensors(path, self._model_config))
        state = store.load(engine, path)
        restarts = loader.load_state_dict(state["loader"], accept_changes=self._run.data_change == "accept")
        for restart in restarts:
            self._monitor.warn(f"{self._name}, data: {restart}")
        progress = Progress(**state["progress"])
        self._monitor.forget_after(self._name, progress.step)
        self._world.from_main(lambda: take_changes(self._folder, path))
        self._world.from_main(lambda: forget_packs(self._folder, state["loader"]))
        if restarts:
            changed = loader.state_dict()
            self._world.from_main(lambda: add_change(self._folder, progress.step, changed, restarts))
        ranks = "" if state["world"] == self._world.size else f", written by {state['world']} rank(s)"
        self._monitor.console.print(
            f"  resumed from {path} after step {progress.step}{ranks}", highlight=False, soft_wrap=True
        )
        return progress
