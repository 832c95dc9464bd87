"""A loss or gradient that is not finite: no rank updates, the packs are named, the run ends past its limit."""

import json

import pytest
import torch

from qwen2vl_train.training.manifest import fault_of
from tests.distributed.launch import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.timeout(1000)]


def rows(folder):
    return [json.loads(line) for line in (folder / "main" / "skipped_updates.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (3, "fp32", False),
        *(pytest.param(stage, "fp32", False, marks=pytest.mark.slow) for stage in range(3)),
        # another of DeepSpeed's optimizers, with float32 gradients of its own: stage 1 has one for bf16 alone
        (1, "bf16", False),
        (2, "bf16", True),
        pytest.param(2, "bf16", False, marks=pytest.mark.slow),
        pytest.param(3, "bf16", False, marks=pytest.mark.slow),
        pytest.param(1, "bf16", True, marks=pytest.mark.slow),
        pytest.param(3, "bf16", True, marks=pytest.mark.slow),
        pytest.param(2, "fp32", True, marks=pytest.mark.slow),
    ],
)
def test_a_bad_pack_on_one_rank_costs_every_rank_that_update_and_nothing_else(tmp_path, stage, precision, offload):
    """Packs 5 (rank 1) and 10 (rank 0) of 4 per step spoil steps 2 and 3: as if 1, 4 and 5 were all."""
    options = {"packs": 4, "zero_stage": stage, "precision": precision, "offload_optimizer": offload}
    finished = train(2, tmp_path / "bad", steps=5, bad_packs={"5": "loss", "10": "gradient"}, **options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    clean = train(2, tmp_path / "clean", steps=3, leave_out=[1, 2], **options)
    assert clean.returncode == 0, clean.stderr[-3000:]
    bad, good = torch.load(tmp_path / "bad" / "weights.pt"), torch.load(tmp_path / "clean" / "weights.pt")
    assert all(torch.equal(bad[name], good[name]) for name in good)
    first, *second = rows(tmp_path / "bad")
    assert first == {"step": 2, "pack": 5, "rank": 1, "loss": None, "keys": ["key-5-0", "key-5-1"]}
    # every loss of step 3 is finite: all its packs are suspects
    assert [(row["step"], row["pack"]) for row in second] == [(3, 8), (3, 10), (3, 9), (3, 11)]
    logged = metrics(tmp_path / "bad")
    assert [logged[step]["skipped_updates"] for step in range(1, 6)] == [0, 1, 2, 2, 2]
    assert logged[2]["loss"] > 0
    assert logged[2]["gradient_norm"] is None


def test_the_run_ends_at_the_limit_with_the_samples_named(tmp_path):
    finished = train(
        2, tmp_path, steps=9, packs=4, bad_packs={"5": "loss", "9": "loss"}, guard={"max_skipped_in_row": 2}
    )
    assert finished.returncode != 0
    assert "2 times in a row" in finished.stderr
    assert "key-9-0" in finished.stderr
    assert max(metrics(tmp_path)) == 2  # the step that passed the limit raised before its log


@pytest.mark.slow
def test_a_checkpoint_on_its_way_to_the_disk_is_finished_before_the_run_ends(tmp_path):
    """Step 4 ends the run on all ranks alike, a second before the checkpoint of step 3 is written."""
    bad = {"bad_packs": {"13": "loss"}, "guard": {"max_skipped_in_row": 1}}
    finished = train(2, tmp_path, steps=9, packs=4, every=3, asynchronous=True, write_delay_s=1, **bad)
    assert finished.returncode != 0
    assert "step 4: loss or gradients were not finite" in finished.stderr
    folder = tmp_path / "main" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003"]
    assert fault_of(folder / "step-00000003") is None
