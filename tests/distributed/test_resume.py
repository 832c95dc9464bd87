"""What a resumed engine takes from its checkpoint and what from its configuration; every ZeRO stage moves its ranks."""

import json
import shutil

import pytest
import torch

from tests.distributed import launch
from tests.distributed.launch import torchrun

pytestmark = pytest.mark.distributed


def train(ranks, folder, **options):
    """What rank 0 saw of training in `folder`."""
    out = folder / "seen.pt"
    folder.mkdir(exist_ok=True)
    checkpoints = folder / "main" / "checkpoints"
    done = torchrun(ranks, "tests.distributed.store_worker", checkpoints, json.dumps(options | {"out": str(out)}))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize(
    ("zero_stage", "before", "after"),
    [
        (1, 1, 2),
        pytest.param(0, 2, 1, marks=pytest.mark.slow),
        pytest.param(0, 1, 2, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_every_zero_stage_continues_on_another_number_of_ranks(tmp_path, zero_stage, before, after):
    """Against 4 steps without a break; ranks add up in another order, so losses agree to float32's rounding.

    In stages 1 and 2, which flatten each group, the second of two ranks holds nothing but padding of one group.
    """
    options = {"zero_stage": zero_stage, "tiny": zero_stage in (1, 2)}
    whole = train(before, tmp_path / "whole", every=9, **options)
    train(before, tmp_path / "moved", steps=2, **options)
    moved = train(after, tmp_path / "moved", **options)
    assert moved["from"].endswith("step-00000002")
    assert set(moved["updates"]) == {2}
    assert moved["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    for name, weight in whole["weights"].items():
        assert float((moved["weights"][name] - weight).norm() / weight.norm().clamp(min=1e-12)) < 1e-4, name


@pytest.mark.parametrize(
    ("zero_stage", "before", "after", "whole"),
    [
        (3, 2, 1, 0),
        pytest.param(3, 1, 2, 0, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, 10_000, marks=pytest.mark.slow),  # small parameters stay whole on every rank
        pytest.param(3, 1, 2, 10_000, marks=pytest.mark.slow),
        pytest.param(2, 2, 1, 0, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, 0, marks=pytest.mark.slow),
    ],
)
def test_frozen_parts_are_the_checkpoints_on_another_number_of_ranks(tmp_path, zero_stage, before, after, whole):
    """Whatever weights the resumed run was built with: here another seed's."""
    options = {"zero_stage": zero_stage, "trainable": ["vit"], "whole": whole}
    written = train(before, tmp_path, steps=2, **options)
    resumed = train(after, tmp_path, steps=2, seed=2, **options)
    assert resumed["from"].endswith("step-00000002")
    for name, weight in written["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        (2, "fp32"),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),  # another of DeepSpeed's optimizers
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_optimizers_settings_are_those_of_the_resumed_run_and_its_state_the_checkpoints(
    tmp_path, zero_stage, precision
):
    engine = {"zero_stage": zero_stage, "precision": precision}
    first = train(1, tmp_path, steps=2, **engine)["weights"]
    changed = train(1, tmp_path, steps=2, rate=5e-4, weight_decay=0.3, betas=[0.8, 0.9], clip=0.25, **engine)
    assert changed["from"].endswith("step-00000002")
    assert changed["clip"] == (0.25 if zero_stage else None)
    for group in changed["settings"]:
        assert group["peak_lr"] == 5e-4
        assert group["weight_decay"] == (0.0 if "no_decay" in group["name"] else 0.3)
        assert tuple(group["betas"]) == (0.8, 0.9)
    assert set(changed["updates"]) == {2}
    assert all(torch.equal(changed["weights"][name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("zero_stage", "precision", "offload"),
    [
        (2, "bf16", True),
        pytest.param(1, "bf16", False, marks=pytest.mark.slow),
        pytest.param(2, "bf16", False, marks=pytest.mark.slow),
        pytest.param(3, "bf16", False, marks=pytest.mark.slow),
        pytest.param(3, "bf16", True, marks=pytest.mark.slow),
        pytest.param(2, "fp32", True, marks=pytest.mark.slow),
    ],
)
def test_bf16_and_offloaded_runs_go_on_bit_for_bit_on_the_same_ranks(tmp_path, zero_stage, precision, offload):
    options = {"zero_stage": zero_stage, "precision": precision, "offload_optimizer": offload}
    whole = train(1, tmp_path, **options)
    resumed = train(1, tmp_path, resume=str(tmp_path / "main" / "checkpoints" / "step-00000002"), seed=2, **options)
    assert set(resumed["updates"]) == {2}
    assert resumed["losses"] == whole["losses"][2:]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


@pytest.mark.faults
@pytest.mark.slow
def test_a_rank_killed_while_a_checkpoint_is_written_is_not_called_a_full_disk(tmp_path):
    options = {"steps": 2, "kill": {"rank": 1, "step": 2}}
    folder = tmp_path / "main" / "checkpoints"
    done = torchrun(2, "tests.distributed.store_worker", folder, json.dumps(options))
    assert done.returncode != 0
    assert "could not write" not in done.stderr
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert [path.name for path in folder.glob("step-*")] == ["step-00000001"]


@pytest.mark.slow
def test_a_skipped_update_that_is_met_again_after_a_resume_is_written_down_once(tmp_path):
    options = {"packs": 2, "every": 2, "bad_packs": {"5": "loss"}}
    first = launch.train(1, tmp_path, steps=3, **options)  # pack 5 is of the third step
    assert first.returncode == 0, first.stderr[-3000:]
    shutil.rmtree(tmp_path / "main" / "checkpoints" / "step-00000003")
    again = launch.train(1, tmp_path, steps=4, **options)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "after step 2" in again.stdout
    lines = (tmp_path / "main" / "skipped_updates.jsonl").read_text().splitlines()
    assert [json.loads(line)["pack"] for line in lines] == [5]
