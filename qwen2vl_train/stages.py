"""The chain of stages: each starts from the export of the one before, is scored, and leaves its figures.

Enters: a validated configuration. Leaves: `<run_dir>/<stage>/export` for each stage, `summary.json`, `report.html`.
The same command continues an interrupted chain: finished stages are skipped, the interrupted one resumes.
"""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipelines.config import DataConfig
from data_pipelines.loader import open_sources
from data_pipelines.shards.storage import expand_shards
from data_pipelines.sources.demo import build_demo
from data_pipelines.tokenizer import TextTokenizer
from qwen2vl_train.config import ConfigError, RunConfig
from qwen2vl_train.course import (
    initial_weights,
    is_stale,
    keep_settings,
    refuse_other_settings,
    refuse_other_weights,
    resume_of,
    settings_of,
)
from qwen2vl_train.evaluation.runner import Report, evaluate
from qwen2vl_train.model.config import ModelConfig
from qwen2vl_train.report import write_report
from qwen2vl_train.start import refuse_other_model
from qwen2vl_train.training.environment import check_environment, find_lack_of_room
from qwen2vl_train.training.kept import read_json, write_json
from qwen2vl_train.training.lock import RunLock
from qwen2vl_train.training.monitor import Monitor
from qwen2vl_train.training.restart import job
from qwen2vl_train.training.stopping import Preempted, StopRequest
from qwen2vl_train.training.trainer import Trainer
from qwen2vl_train.training.watchdog import Watchdog
from qwen2vl_train.training.window import Progress
from qwen2vl_train.training.world import World


def run_chain(run: RunConfig, settings: Mapping[str, Any], world: World, stop: StopRequest, watchdog: Watchdog) -> Path:
    """Run the chain and return the path of `summary.json`. Collective.

    `settings` is the resolved configuration, stored as `config.json` beside the results.

    Raises:
        Preempted: a signal asked to stop; the same command continues.
    """
    folder, save_s = Path(run.run_dir), run.watchdog.save_s
    watchdog.note("opening the run's folder", limit_s=save_s)
    lock = RunLock(folder)  # held by rank 0
    unlocked = world.from_main(lambda: _open_run(run, folder, settings, world, lock))
    watchdog.note("starting the monitor", limit_s=save_s)  # wandb's start can take a minute
    monitor = Monitor(folder, run.monitor, settings, active=world.is_main)
    try:
        if unlocked:
            monitor.warn(unlocked)
        watchdog.note("preparing the data", limit_s=math.inf)
        prepare_data(run, world, monitor)
        world.from_main(lambda: _check_heldout(run))
        watchdog.note("comparing the ranks")
        monitor.console.print(check_environment(run, world))
        tokenizer = TextTokenizer(run.data.tokenizer)
        config = model_config(run, tokenizer)
        if lack := find_lack_of_room(run, config):
            monitor.warn(lack)
        trained = [_run_stage(run, name, config, world, monitor, stop, watchdog) for name in run.chain]
        watchdog.note("writing the summary")
        world.from_main(lambda: _summarise(run, folder, monitor.clock.seconds() / 60, any(trained)))
        world.from_main(lambda: _write_page(folder, monitor))
    finally:
        watchdog.note("ending", limit_s=save_s)
        error = sys.exc_info()[1]
        monitor.close(failed=error is not None and not isinstance(error, Preempted))
    lock.release()  # not before another rank's failure: this process then ends at once
    return folder / "summary.json"


def prepare_data(run: RunConfig, world: World, monitor: Monitor) -> None:
    """Generate the demo shards and their tokenizer where the configuration asks for them. Collective."""
    demo = run.data.demo
    if demo is None:
        return
    monitor.console.print(f"demo data in {run.data.root}", highlight=False, soft_wrap=True)
    total = demo.num_pictures + demo.num_clips

    def build() -> None:
        """Make the data under a progress bar."""
        monitor.start_progress("demo data", total)
        try:
            build_demo(
                Path(run.data.root),
                num_pictures=demo.num_pictures,
                num_clips=demo.num_clips,
                num_texts=demo.num_texts,
                num_heldout=demo.num_heldout,
                vocab_size=demo.vocab_size,
                seed=demo.seed,
                processes=world.size,
                progress=monitor.advance,
            )
        finally:
            monitor.stop_progress()

    world.from_main(build)


def _check_heldout(run: RunConfig) -> None:
    """Find the held-out shards before anything is trained, not when the first stage is done."""
    scored = [run.stages[name].data for name in run.chain if run.stages[name].evaluate]
    for remote in dict.fromkeys(data.remote for data in scored):
        for task, shards in run.data.heldout.items():
            expand_shards(f"data.heldout.{task}", (shards,), remote)


def model_config(run: RunConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """The model's configuration with the vocabulary and token ids of the tokenizer.

    Raises:
        ConfigError: the configured vocabulary is smaller than the tokenizer's.
    """
    config = run.model.config
    size = config.text.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.config.text.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size} entries "
            f"({run.data.tokenizer}); set it to 0 to follow the tokenizer"
        )
    return replace(config, text=replace(config.text, vocab_size=size)).with_token_ids(tokenizer.special)


def _run_stage(
    run: RunConfig,
    name: str,
    config: ModelConfig,
    world: World,
    monitor: Monitor,
    stop: StopRequest,
    watchdog: Watchdog,
) -> bool:
    """Train, export and score stage `name`; False where that was done before. Collective."""
    folder = Path(run.run_dir) / name
    result = folder / "result.json"
    resume = world.from_main(lambda: resume_of(run, name, world.restarted))
    if resume != "none":
        world.from_main(lambda: refuse_other_weights(run, name))
    if resume != "auto":
        world.from_main(lambda: _leave_course(run, name, resume))
    elif run.resume != "auto" and world.restarted:
        monitor.console.print(f"{name}: started again by the launcher, so it goes on as with resume=auto")
    finished = world.from_main(lambda: _is_finished(folder))
    world.from_main(lambda: keep_settings(run, name, resume, world.size // run.engine.sequence_parallel))
    if finished:
        monitor.console.print(f"{name}: finished before, figures in {result}", highlight=False, soft_wrap=True)
        return False
    stop.obey(world, f"before {name}")
    stage = run.stages[name]
    init = world.from_main(lambda: initial_weights(run, name))
    tokenizer = TextTokenizer(run.data.tokenizer)
    if init is not None:
        world.from_main(lambda: refuse_other_model(init, name, config, tokenizer, monitor.warn))
    length = f"{stage.tokens:,} tokens in steps" if stage.tokens else f"{stage.steps} steps"
    monitor.console.print(
        f"[bold]{name}[/bold]: trains {', '.join(stage.trainable)} for {length} of {stage.packs_per_step} packs "
        f"on {world.size} rank(s), from {init or 'seeded random weights'}",
        highlight=False,
    )
    watchdog.note(f"indexing the shards of {name}", limit_s=math.inf)
    index_data(name, stage.data, tokenizer, monitor)
    stop.obey(world, f"before {name}, its shards indexed")  # ranks meet before limits count again
    origin = world.from_main(lambda: {"settings": settings_of(run, name), "revision": _git_revision()})
    progress, kept = Trainer(run, name, init, config, world, monitor, resume, origin).fit(stop, watchdog)
    report = Report({}, {}, [])
    if stage.evaluate and run.data.heldout:
        sets, at = len(run.data.heldout), list[str]()

        def scored(count: int) -> None:
            """Told before the first held-out set and after each."""
            monitor.advance(count)
            if count < sets:
                stop.obey(world, f"in the evaluation of {name}, {count} of {sets} held-out sets done", kept)
            watchdog.note(f"evaluating {name}, {count} sets done", lambda: at, limit_s=run.watchdog.save_s)

        monitor.start_progress(f"{name} eval", sets)
        scored(0)
        report = evaluate(folder / "export", run.data.heldout, stage.data, run.evaluation, world, scored, at)
        monitor.stop_progress()
        monitor.log(name, progress.step, {f"held_out/{key}": value for key, value in report.metrics.items()})
        monitor.show(name, report.shown)
    world.from_main(lambda: _write_result(run, name, progress, report))
    return True


def _is_finished(folder: Path) -> bool:
    """Whether the stage in `folder` is done. A result without its export goes: this course has none yet."""
    if (folder / "export" / "config.json").is_file():
        return (folder / "result.json").is_file()
    (folder / "result.json").unlink(missing_ok=True)
    return False


def _leave_course(run: RunConfig, name: str, resume: str) -> None:
    """Remove what stage `name` left on a course that is not gone on with; before a checkpoint, it is the same one."""
    initial_weights(run, name)  # raises while nothing is lost
    folder = Path(run.run_dir) / name
    stale = ["result.json"]
    if resume == "none":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        stale += ["ledger-rank*.jsonl", "skipped_updates.jsonl", "spikes.jsonl"]
    for path in [path for form in stale for path in folder.glob(form)]:
        path.unlink()


def index_data(name: str, data: DataConfig, tokenizer: TextTokenizer, monitor: Monitor) -> None:
    """Index what is missing of a stage's shards, all ranks together, and show how far it is."""

    def show(shard: str, done: int, total: int) -> None:
        """Called after each shard that this rank had to do with."""
        if done == 1:
            monitor.console.print(f"{name}: indexing {total} shards, once", highlight=False)
            monitor.start_progress(f"{name} index", total)
        monitor.advance(done)

    if data.reader == "index":
        for source in open_sources(data, tokenizer, progress=show):
            source.close()
        monitor.stop_progress()


# ---------------------------------------------------------------------------------------------------------------------


def _open_run(run: RunConfig, folder: Path, settings: Mapping[str, Any], world: World, lock: RunLock) -> str | None:
    """Make the folder or refuse it; what it tells of the run so far changes only once the new settings are accepted.

    Returns why no `lock` keeps a second run out, where the file system knows none.
    """
    for name in run.chain:
        resume = resume_of(run, name, world.restarted)
        if resume != "none":
            refuse_other_settings(run, name, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unlocked = lock.take(world.restarted)
        write_json(folder / "config.json", dict(settings))
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be written ({error}); choose another folder") from error
    packages = ("torch", "deepspeed", "transformers", "webdataset", "hydra-core", "wandb")
    write_json(
        folder / "environment.json",
        {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "world_size": world.size,
            "device": str(world.device),
            "revision": _git_revision(),
            "packages": {name: version(name) for name in packages},
        },
    )
    return unlocked


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel, or no git on this machine
    return answer.stdout.strip()


def _write_result(run: RunConfig, name: str, progress: Progress, report: Report) -> None:
    folder = Path(run.run_dir) / name
    write_json(folder / "held_out.json", {"metrics": report.metrics, "baseline": report.baseline})
    report.save_pictures(folder / "pictures")
    write_json(
        folder / "result.json",
        {
            "trained": list(run.stages[name].trainable),
            "steps": progress.step,
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised,
            "skipped_updates": progress.skipped_updates,
            "rollbacks": progress.rollbacks,
            "loss_first": progress.loss_first,
            "loss_last": progress.loss_last,
            "tokens_per_s": progress.tokens_per_s,
            "fill": progress.fill,
            "seconds": progress.seconds,
            "data_wait_share": progress.wait_s / max(progress.seconds, 1e-9),
            "skipped": progress.lost,
            "changed": progress.changed,
            "documents": progress.documents,
            "held_out": report.metrics,
            "majority": report.baseline,
            "export": str((folder / "export").resolve()),
            "job": job(),
        },
    )


def _summarise(run: RunConfig, folder: Path, minutes: float, trained: bool) -> None:
    """Gather each stage's result; of those begun with weights that have been replaced since, the name alone (`stale`).

    `minutes` are of all invocations; a repetition that finds everything finished (not `trained`) adds none.
    """
    path = folder / "summary.json"
    finished = {name: folder / name / "result.json" for name in run.stages}
    again = "remove it, and the same command does the end of the stage again from its last checkpoint"
    stages = {name: read_json(file, again) for name, file in finished.items() if file.is_file()}
    last = [name for name in run.chain if name in stages][-1]
    if path.is_file() and not trained:
        minutes = read_json(path, "remove it, and the same command writes it again")["minutes"]
    stale: list[str] = []
    for before, name in pairwise(run.stages):
        if is_stale(run, name) or (before in stale and run.stages[name].init_from == "previous"):
            stale.append(name)
    write_json(
        path,
        {
            "minutes": minutes,
            "export": str((folder / last / "export").resolve()),
            "report": str((folder / "report.html").resolve()),
            "stages": {name: result for name, result in stages.items() if name not in stale},
            "stale": [name for name in stale if name in stages],
        },
    )


def _write_page(folder: Path, monitor: Monitor) -> None:
    """The HTML page of the run. It is for watching: the run has finished and does not fail over it."""
    try:
        write_report(folder)
    except Exception as error:  # whatever earlier runs have left in the folder, or the disk has no room for
        monitor.warn(
            f"report.html cannot be written ({type(error).__name__}: {error}), the run is finished all the same; "
            f"qwen2vl report {folder} tries again"
        )
