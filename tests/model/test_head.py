"""The chunked loss against the plain one: values, gradients, what it skips and what it holds."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.peak import measure_peak
from qwen2vl_train.model import head
from qwen2vl_train.model.head import linear_cross_entropy

WIDTH, WORDS = 16, 100


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 7 * WORDS)  # 7 rows a chunk


def inputs(positions: int, dtype=torch.float32, width: int = WIDTH, words: int = WORDS):
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, words, (positions,), generator=generator)


@pytest.mark.parametrize("positions", [1, 7, 50])
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_equal_the_plain_loss(positions):
    hidden, weight, targets = inputs(positions)
    output = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(0.3 * output.loss_sum, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    wanted = torch.autograd.grad(0.3 * plain.sum(), (hidden, weight))
    assert torch.allclose(output.token_losses, plain.detach(), rtol=1e-5, atol=1e-5)
    assert not output.token_losses.requires_grad
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_position_gives_zero_loss_and_zero_gradients():
    hidden, weight, targets = inputs(0)
    output = linear_cross_entropy(hidden, weight, targets)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0.0
    assert output.token_losses.shape == (0,)
    assert hidden.grad.shape == (0, WIDTH)
    assert weight.grad.abs().max() == 0


@pytest.mark.usefixtures("small_chunks")
def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs(9)
    output = linear_cross_entropy(hidden * 1e4, weight, targets)
    plain = F.cross_entropy((hidden * 1e4) @ weight.T, targets, reduction="sum")
    assert output.loss_sum.item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_costs_none():
    hidden, weight, targets = inputs(64, width=8, words=4096)
    weight.requires_grad_(False)
    peak = measure_peak(lambda: linear_cross_entropy(hidden, weight, targets).loss_sum.backward())
    assert weight.grad is None
    assert hidden.grad is not None
    logits_bytes = 64 * 4096 * 4
    assert peak.peak_bytes < logits_bytes + weight.nbytes  # one chunk of logits, and no weight-sized gradient


def test_without_autograd_it_still_answers():
    hidden, weight, targets = inputs(20)
    with torch.no_grad():
        output = linear_cross_entropy(hidden, weight, targets)
    assert not output.loss_sum.requires_grad
    assert output.loss_sum.item() == pytest.approx(F.cross_entropy(hidden @ weight.T, targets, reduction="sum").item())


@pytest.mark.usefixtures("small_chunks")
def test_bf16_chunks_are_added_up_in_float32():
    # 40 chunks: summed in bf16 the error would grow with their number; the bound is that of one bf16 product
    hidden, weight, targets = inputs(280, torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets).loss_sum.backward()
    wide_hidden, wide_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    F.cross_entropy(wide_hidden @ wide_weight.T, targets, reduction="sum").backward()
    assert weight.grad.dtype == torch.bfloat16
    error = (weight.grad.float() - wide_weight.grad).norm() / wide_weight.grad.norm()
    assert error < 2.0**-7


def test_memory_does_not_grow_with_the_number_of_positions(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 32 * 4096)

    def above_weight_gradient(positions: int) -> int:
        hidden, weight, targets = inputs(positions, width=8, words=4096)
        peak = measure_peak(lambda: linear_cross_entropy(hidden, weight, targets).loss_sum.backward())
        return peak.peak_bytes - weight.nbytes - hidden.nbytes  # the two gradients that the caller asked for

    chunk_bytes = 32 * 4096 * 4
    assert above_weight_gradient(256) < 1.2 * chunk_bytes
    assert above_weight_gradient(2048) < 1.2 * chunk_bytes


def test_a_second_backward_is_refused():
    hidden, weight, targets = inputs(3)
    loss = linear_cross_entropy(hidden, weight, targets).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
