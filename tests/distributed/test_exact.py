"""Any ranks x accumulation x ZeRO stage against one plain PyTorch process that holds the whole global batch."""

from functools import cache

import pytest
import torch

from qwen2vl_train.model.qwen2vl import Qwen2VL
from qwen2vl_train.model.weights import initialise
from qwen2vl_train.training.optim import build_optimizer, parameter_groups
from tests.distributed.exact_worker import OPTIM, STEPS
from tests.distributed.launch import torchrun
from tests.distributed.packs import CONFIG, uneven_packs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]
ACCUMULATIONS = (1, 2, 4)


@cache
def one_process(num_packs: int, dtype: torch.dtype = torch.float32) -> dict:
    """Every pack's backward into float32 accumulators, clip by the global norm, SGD on float32 weights."""
    torch.set_num_threads(1)
    master, model = Qwen2VL(CONFIG), Qwen2VL(CONFIG).to(dtype)
    initialise(model, seed=1)
    for parameter, value in zip(master.parameters(), model.parameters(), strict=True):
        parameter.data.copy_(value.data)
    optimizer = build_optimizer(parameter_groups(master, OPTIM, CONFIG.vision.depth), OPTIM)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        packs = uneven_packs(num_packs, seed=step)
        count = sum(pack.num_supervised for pack in packs)
        tokens = []
        for pack in packs:
            output = model(pack)
            (output.loss_sum / count).backward()
            tokens.append(output.token_losses.double())
            for parameter, value in zip(master.parameters(), model.parameters(), strict=True):
                parameter.grad = value.grad.float() + (0 if parameter.grad is None else parameter.grad)
                value.grad = None
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in master.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(master.parameters(), OPTIM.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
        for parameter, value in zip(master.parameters(), model.parameters(), strict=True):
            value.data.copy_(parameter.data)
        datasets = torch.cat([pack.loss_datasets for pack in packs])
        every = torch.cat(tokens)
        means = [every[datasets == dataset].sum() / max(1, (datasets == dataset).sum()) for dataset in (0, 1)]
        losses.append([float(every.mean()), *map(float, means)])
    weights = {name: parameter.detach() for name, parameter in master.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm; a gradient that is zero (the ViT's in packs of text) must be zero."""
    return float((ours - theirs).norm() / theirs.norm()) if theirs.any() else float(ours.abs().max())


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_float32_equals_one_process_in_every_stage_of_zero(tmp_path, ranks):
    out = tmp_path / "cases.pt"
    finished = torchrun(ranks, "tests.distributed.exact_worker", out, "fp32", "0,1,2,3", "1,2,4")
    assert finished.returncode == 0, finished.stderr[-3000:]
    cases = torch.load(out)
    assert set(cases) == {(stage, each, 0) for stage in range(4) for each in ACCUMULATIONS} | {(3, 2, 100_000)}
    for (stage, accumulation, whole), ours in cases.items():
        theirs, case = one_process(ranks * accumulation), f"ZeRO {stage}, accumulation {accumulation}, whole {whole}"
        torch.testing.assert_close(
            torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-6, atol=0, msg=case
        )
        torch.testing.assert_close(
            torch.tensor(ours["norms"]), torch.tensor(theirs["norms"]), rtol=1e-5, atol=0, msg=case
        )
        assert max(theirs["norms"]) > 1.2 * OPTIM.clip_norm, "clipping must have something to do"
        for name, gradient in theirs["gradients"].items():
            assert relative_error(ours["gradients"][name], gradient) < 1e-5, f"{case}: gradient of {name}"
        for name, weight in theirs["weights"].items():
            assert relative_error(ours["weights"][name], weight) < 1e-5, f"{case}: {name}"


@pytest.mark.slow
def test_bf16_accumulates_and_communicates_gradients_in_float32(tmp_path):
    """Either alone leaves 2e-3. The packs' own gradients are bf16 in both; two ranks add no rounding of their own."""
    out = tmp_path / "cases.pt"
    finished = torchrun(2, "tests.distributed.exact_worker", out, "bf16", "1,2,3", "2,4")
    assert finished.returncode == 0, finished.stderr[-3000:]
    cases = torch.load(out)
    assert set(cases) == {(stage, each, 0) for stage in (1, 2, 3) for each in (2, 4)} | {(3, 2, 100_000)}
    for (stage, accumulation, whole), ours in cases.items():
        theirs = one_process(2 * accumulation, torch.bfloat16)
        case = f"ZeRO {stage}, accumulation {accumulation}, whole {whole}"
        assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-6), case
        assert ours["norms"][0] == pytest.approx(theirs["norms"][0], rel=1e-5), case
        for name, gradient in theirs["gradients"].items():
            assert relative_error(ours["gradients"][name], gradient) < 1e-5, f"{case}: gradient of {name}"
        # weights that fall on the other side of a bf16 rounding border change the later steps
        assert ours["losses"] == [pytest.approx(step, rel=2e-3) for step in theirs["losses"]], case
