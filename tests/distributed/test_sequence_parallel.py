"""A pack split over ranks against one plain PyTorch process that holds every pack whole."""

from functools import cache

import pytest
import torch

from qwen2vl_train.model.parts import freeze
from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.optim import build_optimizer, parameter_groups
from tests.distributed.exact_worker import OPTIM
from tests.distributed.launch import torchrun
from tests.distributed.sequence_worker import CONFIG, STEPS, shared_packs
from tests.distributed.test_exact import relative_error

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
EVERYTHING = "vit+merger+llm"


@cache
def one_process(trainable: str) -> dict:
    """The same steps without any split: one loss over all packs, one backward, clip, SGD."""
    torch.set_num_threads(1)
    model = Qwen2VL(CONFIG)
    initialise(model, seed=1)
    freeze(model, trainable.split("+"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(parameter_groups(model, OPTIM, CONFIG.vision.depth), OPTIM)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        packs = shared_packs(step)
        outputs = [model(pack) for pack in packs]
        (sum(output.loss_sum for output in outputs) / sum(pack.num_supervised for pack in packs)).backward()
        gradients = gradients or {name: parameter.grad.clone() for name, parameter in trained.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
        tokens = torch.cat([output.token_losses for output in outputs]).double()
        datasets = torch.cat([pack.loss_datasets for pack in packs])
        losses.append([float(tokens[datasets == dataset].mean()) for dataset in (0, 1)])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def assert_equal_to_no_split(cases: dict) -> None:
    for (share, stage, trainable), ours in cases.items():
        theirs, case = one_process(trainable), f"{share} ranks a pack, ZeRO {stage}, {trainable} train"
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
    finished = torchrun(2, "tests.distributed.sequence_worker", tmp_path / "out.pt", "2", "3,1", EVERYTHING)
    assert finished.returncode == 0, finished.stderr[-3000:]
    cases = torch.load(tmp_path / "out.pt")
    assert set(cases) == {(2, 3, EVERYTHING), (2, 1, EVERYTHING)}
    assert_equal_to_no_split(cases)


@pytest.mark.slow
def test_a_stage_of_frozen_parts_on_two_ranks_a_pack_equals_no_split(tmp_path):
    """The frozen ViT keeps no activation; the frozen LLM passes gradients back to the frames' ranks."""
    finished = torchrun(2, "tests.distributed.sequence_worker", tmp_path / "out.pt", "2", "3,0", "vit+merger,llm")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_equal_to_no_split(torch.load(tmp_path / "out.pt"))


@pytest.mark.slow
def test_four_ranks_in_groups_of_two_and_of_four_equal_no_split(tmp_path):
    """Groups of two beside each other (data parallelism), and one of four: more ranks than key/value heads."""
    finished = torchrun(4, "tests.distributed.sequence_worker", tmp_path / "out.pt", "2,4", "3,1,2,0", EVERYTHING)
    assert finished.returncode == 0, finished.stderr[-3000:]
    cases = torch.load(tmp_path / "out.pt")
    assert len(cases) == 8
    assert_equal_to_no_split(cases)
