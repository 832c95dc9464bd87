"""Output head and loss in one: hidden states at supervised positions -> summed cross-entropy.

Enters: [L, D] hidden states, the output matrix [V, D], the tokens that follow. Leaves: the float32 sum of their losses
and each of them. The [L, V] logits never exist: rows are taken in chunks, and each chunk's gradients are computed in
the forward pass while its logits are there, so nothing is recomputed. Costs, beside the weight's gradient: one chunk
of logits in float32 (128 MiB at most) and the hidden states' gradient [L, D].

Liger's fused kernel (`LigerFusedLinearCrossEntropyFunction`, 0.8.5) is not used, on CUDA either. Each token's loss,
which the per-dataset figures are made of, comes only with reduction="none", whose backward computes all logits a second
time; with "sum" it is kept inside. Every forward waits for the device (`target_mask.sum().item()`) and so does the
backward (`torch.equal`), where this step has no host synchronisation; and L = 0, a rank without labels, divides by
zero. Both round logits and their slopes to the inputs' dtype alike.

Legend: L supervised positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Large enough that adding a chunk's share to the weight's gradient (reading and writing V x D numbers) is a small part
# of the chunk's three matrix products, small enough to be 1/18 of the logits of 4,096 positions x 151,936 words.
CHUNK_ELEMENTS = 1 << 25


class LossOutput(NamedTuple):
    """`loss_sum`: float32 scalar, differentiable. `token_losses`: float32 [L], detached."""

    loss_sum: Tensor
    token_losses: Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> LossOutput:
    """Sum over positions of -log softmax(hidden @ weight.T)[target].

    hidden [L, D], weight [V, D], targets int64 [L]. L = 0 gives 0 with zero gradients, still connected to the graph:
    every rank of a distributed step must run backward. Gradients exist for what requires them: a frozen weight costs
    nothing. Logits are rounded to the inputs' dtype, everything after them is float32.
    """
    loss_sum, token_losses = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return LossOutput(loss_sum, token_losses)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss with the gradients of its sum: forward leaves them in `ctx.gradients`, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take hidden [L, D], weight [V, D], targets int64 [L] -> float32 (sum, losses [L], not differentiable)."""
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # several chunks are added up in float32: rounding each partial sum to bf16 would lose small contributions
        sum_dtype = weight.dtype if hidden.shape[0] <= rows else torch.float32
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if wants_weight else None

        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            losses[part] = _chunk(
                hidden[part],
                weight,
                targets[part, None],
                None if grad_hidden is None else grad_hidden[part],
                grad_weight,
            )

        ctx.gradients = (grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients of hidden states [L, D] and weight [V, D] for that of the sum, a scalar; once only.

        Raises RuntimeError the second time: they were scaled where they lie.
        """
        if ctx.gradients is None:
            raise RuntimeError("the loss keeps its gradients for one backward pass only; run forward again")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        # scaled where they lie: a second weight-sized tensor would double the head's memory
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(grad_sum)
        return grad_hidden, grad_weight, None


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> Tensor:
    """Losses [n] of n rows; fills `grad_hidden` [n, D] and adds to `grad_weight` where they are wanted.

    A function of its own so that a chunk's memory is free before the next one's is taken.
    """
    logits = (hidden @ weight.T).float()
    # logits, exponentials and slopes share one memory: logsumexp would take as much again
    chosen = logits.gather(1, targets)
    largest = logits.amax(dim=-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    losses = (total.log() + largest - chosen).squeeze(1)
    if grad_hidden is None and grad_weight is None:
        return losses
    slope = exponentials.mul_(total.reciprocal())  # softmax - one-hot
    slope = slope.scatter_add_(1, targets, torch.full_like(total, -1.0)).to(hidden.dtype)
    if grad_hidden is not None:
        torch.mm(slope, weight, out=grad_hidden)
    if grad_weight is not None:
        _add_product(grad_weight, slope.T, hidden)
    return losses


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Do total += left @ right, where `total` may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
