"""Checkpoints of the real loop: resumed bitwise, at other world sizes, pre-empted, pruned, refused without room."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.sources.bpe import train_bpe
from qwen2vl_train.training.manifest import fault_of
from tests.distributed.launch import metrics, start_training, train, wait_for_step, workers_of

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1000)]


def losses(folder):
    return [(step, line["loss"]) for step, line in sorted(metrics(folder).items())]


def steps_kept(folder):
    return sorted(int(path.name[5:]) for path in (folder / "main" / "checkpoints").glob("step-*"))


def relative_error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@pytest.mark.parametrize(
    "signal_number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_rest_is_bitwise(tmp_path, signal_number):
    whole = train(2, tmp_path / "whole", steps=8, packs=4)
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "stopped"
    process = start_training(2, folder, steps=8, packs=4, step_s=0.5)
    wait_for_step(folder, 2)
    workers_of(process)[1].send_signal(signal_number)
    assert process.wait(120) != 0
    log = (folder / "log").read_text()
    assert "main stopped after step" in log
    assert "exitcode  : 75" in log.replace("exitcode: 75", "exitcode  : 75")
    (kept,) = steps_kept(folder)
    assert 2 <= kept < 8
    again = train(2, folder, steps=8, packs=4)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"after step {kept}" in again.stdout
    assert losses(folder) == losses(tmp_path / "whole")
    ours, theirs = torch.load(folder / "weights.pt"), torch.load(tmp_path / "whole" / "weights.pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("trainable", "tied", "before", "after"),
    [("vit,merger,llm", True, 2, 1), ("vit,merger,llm", False, 1, 2), ("merger,llm", True, 2, 4)],
    ids=["tied 2 to 1", "untied 1 to 2", "frozen ViT 2 to 4"],
)
def test_another_number_of_ranks_continues_within_rounding(tmp_path, trainable, tied, before, after):
    """The groups differ in weight decay and the biases of AdamW's averages still matter at step 4."""
    options = {"packs": 4, "trainable": trainable, "tied": tied}
    whole = train(before, tmp_path / "whole", steps=7, **options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    first = train(before, tmp_path / "moved", steps=3, **options)
    assert first.returncode == 0, first.stderr[-3000:]
    second = train(after, tmp_path / "moved", steps=7, **options)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"after step 3, written by {before} rank(s)" in second.stdout
    assert not list((tmp_path / "moved" / "main" / "checkpoints").glob(".universal-*"))
    for (_, ours), (_, theirs) in zip(losses(tmp_path / "moved"), losses(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = torch.load(tmp_path / "moved" / "weights.pt"), torch.load(tmp_path / "whole" / "weights.pt")
    for name, weight in theirs.items():
        assert relative_error(ours[name], weight) < 1e-4, name


def test_a_damaged_checkpoint_is_passed_over_and_no_rank_loads_it(tmp_path):
    assert train(2, tmp_path, steps=4, packs=4, every=2, keep=3).returncode == 0
    newest = tmp_path / "main" / "checkpoints" / "step-00000004"
    shard = next(newest.rglob("*zero_pp_rank_1*optim_states.pt"))
    with shard.open("r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))
    again = train(2, tmp_path, steps=5, packs=4)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "another checksum" in again.stdout
    assert "after step 2" in again.stdout
    refused = train(2, tmp_path, steps=6, packs=4, resume=str(tmp_path / "main" / "checkpoints" / "step-00000099"))
    assert refused.returncode != 0
    assert "not a finished checkpoint" in refused.stderr


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_one_written_while_training_goes_on_holds_the_step_it_was_asked_for(tmp_path, zero_stage):
    """Its writer starts half a second late, in which two more updates are made: the weights resumed are not theirs."""
    options = {"packs": 4, "every": 3, "keep": 9, "zero_stage": zero_stage}
    whole = train(2, tmp_path / "whole", steps=7, **options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    aside = train(2, tmp_path / "aside", steps=7, asynchronous=True, write_delay_s=0.5, **options)
    assert aside.returncode == 0, aside.stderr[-3000:]
    assert steps_kept(tmp_path / "aside") == [3, 6, 7]
    for step in (6, 7):
        shutil.rmtree(tmp_path / "aside" / "main" / "checkpoints" / f"step-{step:08d}")
    again = train(2, tmp_path / "aside", steps=7, **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "after step 3" in again.stdout
    assert losses(tmp_path / "aside") == losses(tmp_path / "whole")
    ours, theirs = torch.load(tmp_path / "aside" / "weights.pt"), torch.load(tmp_path / "whole" / "weights.pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_when_none_is_whole_the_stage_does_not_start_anew_by_itself(tmp_path):
    assert train(1, tmp_path, steps=2, packs=2, every=1).returncode == 0
    for manifest in (tmp_path / "main" / "checkpoints").glob("step-*/manifest.json"):
        manifest.unlink()
    refused = train(1, tmp_path, steps=3, packs=2)
    assert refused.returncode != 0
    assert f"none of the 2 checkpoint(s) in {tmp_path}/main/checkpoints is whole" in refused.stderr
    assert "resume=none" in refused.stderr


def test_the_last_k_and_every_nth_stay_and_a_new_start_leaves_nothing_of_the_old(tmp_path):
    assert train(1, tmp_path, steps=9, packs=2, every=1, keep=2, keep_every=4).returncode == 0
    assert steps_kept(tmp_path) == [4, 8, 9]
    assert (tmp_path / "main" / "checkpoints" / "latest").read_text() == "step-00000009"
    again = train(1, tmp_path, steps=3, packs=2, every=2, resume="none")
    assert again.returncode == 0, again.stderr[-3000:]
    assert steps_kept(tmp_path) == [2, 3]
    assert sorted(metrics(tmp_path)) == [1, 2, 3]


def test_without_room_on_the_disk_training_goes_on_and_says_so(tmp_path):
    finished = train(2, tmp_path, steps=2, packs=4, every=1, min_free_gb=1e6)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("no checkpoint at step") == 2
    assert "checkpoint.min_free_gb" in finished.stdout
    assert steps_kept(tmp_path) == []


@pytest.mark.parametrize(("steps", "stopped"), [(9, 4), (3, 3)], ids=["amid the stage", "in its last step"])
def test_a_stop_without_room_for_its_checkpoint_ends_with_a_code_of_its_own(tmp_path, steps, stopped):
    """Not 75, at which schedulers start the same again: it would lose the same steps each time.

    The signal comes in step 3, whose ranks have agreed to go on already.
    """
    fault = {"kind": "term", "rank": 0, "step": 2}
    finished = train(1, tmp_path, steps=steps, packs=2, every=9, min_free_gb=1e6, fault=fault)
    assert "exitcode: 74" in finished.stderr.replace("exitcode  :", "exitcode:"), finished.stderr[-3000:]
    said = f"main stopped after step {stopped} on SIGTERM; its checkpoint could not be written (see above)"
    assert said in finished.stderr
    assert steps_kept(tmp_path) == []


@pytest.mark.parametrize("min_free_gb", [0, 1e6], ids=["with the last checkpoint", "without"])
def test_an_export_that_fails_says_what_the_next_start_does_again(tmp_path, min_free_gb):
    train_bpe(["a word or two"], tmp_path / "tokenizer", vocab_size=300)
    options = {"steps": 2, "packs": 2, "tokenizer": str(tmp_path / "tokenizer"), "tensor_s": 0}
    (tmp_path / "main").mkdir()
    in_the_way = tmp_path / "main" / ".writing-export"
    in_the_way.write_text("")
    failed = train(1, tmp_path, min_free_gb=min_free_gb, **options)
    assert failed.returncode != 0
    assert "could not write the export" in failed.stderr
    again = "trains the steps since the last checkpoint again" if min_free_gb else "does the export alone"
    assert f"start the same command again, which {again}" in failed.stderr
    assert ("or the evaluation not come to its end" in failed.stdout) == bool(min_free_gb)
    in_the_way.unlink()
    assert train(1, tmp_path, min_free_gb=min_free_gb, **options).returncode == 0
    assert (tmp_path / "main" / "export" / "config.json").is_file()


def run_with_kills(folder, pauses_s, **options):
    """Start again for each pause, and kill one rank (every other time both) that long after the ranks are there."""
    for number, pause_s in enumerate(pauses_s):
        process = start_training(2, folder, **options)
        while process.poll() is None and len(workers_of(process)) < 2:
            time.sleep(0.02)
        if number == 0:
            wait_for_step(folder, 1)
        time.sleep(pause_s)
        ranks = workers_of(process) if process.poll() is None else []
        for rank in ranks if number % 2 else ranks[-1:]:
            rank.kill()
        assert process.wait(120) != 0 or not ranks
        latest = folder / "main" / "checkpoints" / "latest"
        if latest.exists():
            assert fault_of(latest.parent / latest.read_text()) is None


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"asynchronous": True},
        {"zero_stage": 2, "precision": "bf16"},
        {"precision": "bf16", "whole": 100_000},  # the default for GPUs: every parameter of this model
    ],
    ids=["waiting", "asynchronous", "ZeRO-2 bf16", "ZeRO-3 bf16, small parameters whole"],
)
def test_killed_ranks_lose_nothing_beyond_the_last_checkpoint(tmp_path, engine):
    options = {"steps": 12, "packs": 4, "every": 1, "keep": 2} | engine
    assert train(2, tmp_path / "whole", **options).returncode == 0
    run_with_kills(tmp_path / "killed", (0.3, 7.0), step_s=0.2, **options)
    last = train(2, tmp_path / "killed", **options)
    assert last.returncode == 0, last.stderr[-3000:]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_kill_during_the_export_leaves_no_half_one_and_the_next_start_writes_it(tmp_path):
    train_bpe(["a word or two"], tmp_path / "tokenizer", vocab_size=300)
    options = {"steps": 4, "packs": 4, "every": 4, "tokenizer": str(tmp_path / "tokenizer")}
    assert train(2, tmp_path / "whole", tensor_s=0, **options).returncode == 0
    folder = tmp_path / "killed"
    process = start_training(2, folder, tensor_s=0.3, **options)
    aside = folder / "main" / ".writing-export"
    deadline = time.monotonic() + 200
    while not aside.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in workers_of(process):
        rank.kill()
    assert process.wait(120) != 0
    assert aside.exists()
    assert not (folder / "main" / "export").exists()
    again = train(2, folder, tensor_s=0, **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "after step 4" in again.stdout
    assert not aside.exists()
    whole, exported = (load_file(run / "main" / "export" / "model.safetensors") for run in (tmp_path / "whole", folder))
    assert whole.keys() == exported.keys()
    assert all(torch.equal(whole[name], exported[name]) for name in whole)


@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments(tmp_path):
    generator = torch.Generator().manual_seed(0)
    options = {"steps": 400, "packs": 4, "every": 1, "keep": 2}
    assert train(2, tmp_path / "whole", **options).returncode == 0
    pauses = (8 * torch.rand(50, generator=generator)).tolist()
    run_with_kills(tmp_path / "killed", pauses, **options)
    last = train(2, tmp_path / "killed", **options)
    assert last.returncode == 0, last.stderr[-3000:]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    print(json.dumps({"kills": 50, "steps": 400}))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "asynchronous"])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tmp_path, small_disk, asynchronous):
    """A disk of 3 MB holds two checkpoints of 1.1 MB; the look at its free space beforehand is made blind."""
    folder = small_disk / "run"
    finished = train(2, folder, steps=9, packs=4, every=1, keep=9, asynchronous=asynchronous, takes_bytes=0)
    assert finished.returncode != 0
    # written aside, the first to find no room may also be the line of figures that is logged meanwhile
    assert "could not write" in finished.stderr or (asynchronous and "No space left on device" in finished.stderr)
    latest = folder / "main" / "checkpoints" / "latest"
    newest = latest.parent / latest.read_text()
    assert fault_of(newest) is None
    done = json.loads((newest / "state.json").read_text())["step"]
    kept = tmp_path / "moved"
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns(".writing-*"))
    again = train(2, kept, steps=9, packs=4)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"after step {done}" in again.stdout
