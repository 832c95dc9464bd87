"""A loss spike: all ranks go back to the last checkpoint and on with the packs that follow it."""

import json

import pytest
import torch

from tests.distributed.launch import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.timeout(1000)]
GUARD = {"spike_sigma": 6, "spike_window": 4}
SPIKED = {"packs": 4, "every": 4, "guard": GUARD, "bad_packs": {"21": "spike"}}


def losses(folder):
    return [(step, line["loss"]) for step, line in sorted(metrics(folder).items())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"zero_stage": 1, "precision": "bf16", "asynchronous": True, "write_delay_s": 1},
        {"whole": 100_000},  # the default for GPUs: every parameter of this model
    ],
    ids=["ZeRO-3", "ZeRO-1 bf16, asynchronous", "ZeRO-3, small parameters whole"],
)
def test_a_spike_costs_the_steps_since_the_checkpoint_and_is_never_seen_again(tmp_path, engine):
    """Pack 21 of 4 per step makes step 6 a spike: back to step 4, on with the packs of what would have been step 7.

    The run ends in between and is resumed; the reference never sees the packs of steps 5 and 6.
    """
    options = SPIKED | engine
    first = train(2, tmp_path / "spiked", steps=6, **options)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "rollback 1 of at most 10" in first.stdout
    again = train(2, tmp_path / "spiked", steps=9, **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "rollback" not in again.stdout
    clean = train(2, tmp_path / "clean", steps=9, packs=4, leave_out=[4, 5], **engine)
    assert clean.returncode == 0, clean.stderr[-3000:]
    (line,) = [json.loads(line) for line in (tmp_path / "spiked" / "main" / "spikes.jsonl").read_text().splitlines()]
    assert (line["step"], line["returned_to"], line["rollbacks"]) == (6, 4, 1)
    assert [row["pack"] for row in line["packs"]] == [20, 22, 21, 23]
    assert line["packs"][2]["keys"] == ["key-21-0", "key-21-1"]
    assert line["loss"] > 1.2 * line["mean"]  # nine times the loss of 6 labels among 141
    assert losses(tmp_path / "spiked") == losses(tmp_path / "clean")
    ours, theirs = torch.load(tmp_path / "spiked" / "weights.pt"), torch.load(tmp_path / "clean" / "weights.pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_spike_while_a_checkpoint_is_written_goes_back_to_that_one_and_counts_skipped_updates_on(tmp_path):
    """Step 5 is skipped, step 6 a spike: back to step 4, whose checkpoint is on its way to the disk.

    The next skipped update, of what is step 5 then, is the second one.
    """
    options = {"bad_packs": {"9": "loss", "10": "spike", "13": "loss"}, "asynchronous": True, "write_delay_s": 1}
    guard = GUARD | {"max_skipped": 2}
    finished = train(1, tmp_path, steps=9, **SPIKED | options | {"packs": 2, "guard": guard})
    assert finished.returncode != 0
    assert "checkpoints/step-00000004, on with the packs after the spike (rollback 1" in finished.stdout
    assert "step 5: loss or gradients were not finite, 1 times in a row and 2 times in this stage" in finished.stderr


def test_past_the_limit_the_run_ends_with_the_samples_named(tmp_path):
    """Steps 6 and 7 of the data spike: the second one is met as step 5, after the first rollback."""
    options = SPIKED | {"guard": GUARD | {"max_rollbacks": 1}, "bad_packs": {"21": "spike", "26": "spike"}}
    finished = train(2, tmp_path, steps=9, **options)
    assert finished.returncode != 0
    assert "after 1 rollbacks (guard.max_rollbacks=1)" in finished.stderr
    lines = [json.loads(line) for line in (tmp_path / "main" / "spikes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["returned_to"]) for line in lines] == [(6, 4), (5, 4)]


def test_with_no_checkpoint_to_go_back_to_a_spike_at_the_end_is_logged_and_saved_as_any_step(tmp_path):
    finished = train(2, tmp_path, steps=6, **SPIKED | {"every": 99})
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "no checkpoint lies before it, so training goes on" in finished.stdout
    assert sorted(metrics(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "main" / "checkpoints" / "latest").read_text() == "step-00000006"


@pytest.mark.slow
def test_a_stage_of_so_many_tokens_ends_there_and_resumes_on_the_same_rates(tmp_path):
    options = {"packs": 4, "mix": True, "tokens": 1200, "schedule": "linear", "warmup_tokens": 400, "every": 1}
    whole = train(2, tmp_path / "whole", **options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    figures = metrics(tmp_path / "whole")
    tokens = [figures[step]["tokens"] for step in sorted(figures)]
    assert tokens[-2] < 1200 <= tokens[-1]
    rates = [figures[step]["lr/llm"] for step in sorted(figures)]
    # peak 1e-3, a step's capacity 4 * 256: the first update is at 1024 / (400 + 1024) of it, the last at the floor
    assert rates[0] == pytest.approx(1e-3 * 1024 / 1424)
    assert rates[-1] == pytest.approx(1e-4)
    broken = train(2, tmp_path / "broken", fault={"kind": "raise", "rank": 0, "step": 3}, **options)
    assert broken.returncode != 0
    again = train(2, tmp_path / "broken", **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert [line["lr/llm"] for _, line in sorted(metrics(tmp_path / "broken").items())] == rates
