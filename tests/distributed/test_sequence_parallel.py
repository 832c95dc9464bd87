"""A pack split over ranks against one plain PyTorch process that holds every pack whole."""

from functools import cache

import pytest
import torch

from qwen2vl_train.config import ConfigError
from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.optim import build_optimizer, parameter_groups
from qwen2vl_train.training.sequence import SequenceGroup
from qwen2vl_train.training.world import World
from tests.distributed.exact_worker import OPTIM
from tests.distributed.launch import metrics, torchrun, train
from tests.distributed.sequence_worker import CONFIG, PACKS, STEPS
from tests.distributed.test_exact import relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
EVERYTHING = "vit+merger+llm"


@cache
def one_process(kind: str, trainable: str) -> dict:
    """The same steps without any split: one loss over all packs, one backward, clip, SGD."""
    torch.set_num_threads(1)
    model = Qwen2VL(CONFIG)
    initialise(model, seed=1)
    freeze(model, trainable.split("+"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(parameter_groups(model, OPTIM, CONFIG.vision.depth), OPTIM)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        packs = PACKS[kind](step)
        outputs = [model(pack) for pack in packs]
        (sum(output.loss_sum for output in outputs) / sum(pack.num_supervised for pack in packs)).backward()
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in trained.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
        tokens = torch.cat([output.token_losses for output in outputs]).double()
        datasets = torch.cat([pack.loss_datasets for pack in packs])
        means = [tokens[datasets == dataset].sum() / max(1, (datasets == dataset).sum()) for dataset in (0, 1)]
        losses.append([float(mean) for mean in means])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def assert_equal_to_no_split(cases: dict, kind: str = "mixed") -> None:
    for (share, stage, trainable), ours in cases.items():
        theirs, case = one_process(kind, trainable), f"{share} ranks a pack, ZeRO {stage}, {trainable} train"
        torch.testing.assert_close(
            torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-6, atol=0, msg=case
        )
        torch.testing.assert_close(
            torch.tensor(ours["norms"]), torch.tensor(theirs["norms"]), rtol=1e-5, atol=0, msg=case
        )
        parts = {"visual": 0.0, "model": 0.0}
        for name, gradient in theirs["gradients"].items():
            error = relative_error(ours["gradients"][name], gradient)
            parts[name.split(".")[0]] = max(parts[name.split(".")[0]], error)
        print(f"{case}: largest relative gradient error {parts}")
        assert parts["visual"] < 1e-5, case
        assert parts["model"] < 1e-5, case
        for name, weight in theirs["weights"].items():
            assert relative_error(ours["weights"][name], weight) < 1e-5, f"{case}: {name}"


def test_a_pack_on_two_ranks_equals_no_split(tmp_path):
    finished = torchrun(2, "tests.distributed.sequence_worker", tmp_path / "out.pt", "mixed", "2", "3,1", EVERYTHING)
    assert finished.returncode == 0, finished.stderr[-3000:]
    cases = torch.load(tmp_path / "out.pt")
    assert set(cases) == {(2, 3, EVERYTHING), (2, 1, EVERYTHING)}
    assert_equal_to_no_split(cases)


@pytest.mark.slow
def test_a_stage_of_frozen_parts_on_two_ranks_a_pack_equals_no_split(tmp_path):
    """The frozen ViT keeps no activation; the frozen LLM passes gradients back to the frames' ranks."""
    finished = torchrun(
        2, "tests.distributed.sequence_worker", tmp_path / "out.pt", "mixed", "2", "3,0", "vit+merger,llm"
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_equal_to_no_split(torch.load(tmp_path / "out.pt"))


@pytest.mark.slow
def test_four_ranks_in_groups_of_two_and_of_four_equal_no_split(tmp_path):
    """Groups of two beside each other (data parallelism), and one of four: more ranks than key/value heads."""
    finished = torchrun(
        4, "tests.distributed.sequence_worker", tmp_path / "out.pt", "mixed", "2,4", "3,1,2,0", EVERYTHING
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    cases = torch.load(tmp_path / "out.pt")
    assert len(cases) == 8
    assert_equal_to_no_split(cases)


@pytest.mark.slow
def test_a_pack_of_16384_tokens_on_two_ranks_equals_no_split(tmp_path):
    finished = torchrun(2, "tests.distributed.sequence_worker", tmp_path / "out.pt", "full", "2", "3", EVERYTHING)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_equal_to_no_split(torch.load(tmp_path / "out.pt"), "full")


def test_ranks_that_cannot_share_out_the_heads_are_refused_with_the_possible_numbers():
    world = World(0, 24, 0, torch.device("cpu"))
    said = (
        r"sequence_parallel=8 must divide the 24 rank\(s\) and the model's 28 attention heads.* choose 1 or 2 or 4, or"
    )
    with pytest.raises(ConfigError, match=said):
        SequenceGroup.form(world, 8, num_heads=28, timeout_s=60)


COUNTED = ("tokens", "supervised_tokens", "documents/even", "documents/odd", "fill", "vision_share")


@pytest.mark.slow
def test_the_loop_counts_a_shared_pack_once_and_continues_bitwise(tmp_path):
    """Two groups of two ranks see what two ranks see; continued from step 3 they see what they would have seen."""
    options = {"steps": 6, "packs": 4, "optimizer": "sgd"}
    for ranks, folder, more in (
        (2, "plain", {}),
        (4, "shared", {"sequence_parallel": 2}),
        (4, "continued", {"sequence_parallel": 2, "steps": 3}),
        (4, "continued", {"sequence_parallel": 2}),
    ):
        finished = train(ranks, tmp_path / folder, **options | more)
        assert finished.returncode == 0, finished.stderr[-3000:]
    plain, shared, continued = (metrics(tmp_path / folder) for folder in ("plain", "shared", "continued"))
    assert set(plain) == set(shared) == set(continued) == set(range(1, 7))
    for step, line in plain.items():
        assert shared[step]["loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert shared[step]["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-5)
        assert {name: shared[step][name] for name in COUNTED} == {name: line[name] for name in COUNTED}
        assert continued[step]["loss"] == shared[step]["loss"]
    ours, theirs = torch.load(tmp_path / "continued" / "weights.pt"), torch.load(tmp_path / "shared" / "weights.pt")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_a_pack(tmp_path):
    """The plan's state counts packs and each rank's share of the parameters is the same: only rounding differs."""
    for folder, steps, share in (("whole", 6, 1), ("moved", 3, 1), ("moved", 6, 2)):
        finished = train(2, tmp_path / folder, steps=steps, packs=4, optimizer="sgd", sequence_parallel=share)
        assert finished.returncode == 0, finished.stderr[-3000:]
    moved, whole = metrics(tmp_path / "moved"), metrics(tmp_path / "whole")
    for step, line in whole.items():
        assert moved[step]["loss"] == pytest.approx(line["loss"], rel=1e-6)
