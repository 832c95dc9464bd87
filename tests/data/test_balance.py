"""Costs of packs and the order that makes ranks wait least."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipelines.plan.balance import PackCost, imbalance, order_by_cost
from data_pipelines.plan.packer import Item


def pack(number, *tokens):
    return SimpleNamespace(number=number, items=[Item(0, 0, 0, 0, n, 0, 0) for n in tokens])


def test_a_cost_counts_tokens_patches_and_pairs_inside_documents():
    cost = PackCost(per_token=1, per_token_pair=0.5, per_patch=10, per_patch_pair=0.25)
    items = [Item(0, 0, 0, 0, 4, 0, 0), Item(0, 0, 0, 0, 6, 8, 32)]
    # 4 + 0.5 * 16 = 12; 6 + 0.5 * 36 + 80 + 0.25 * 32 = 112
    assert cost.pack(SimpleNamespace(number=0, items=items)) == 124


def test_coefficients_are_read_from_a_models_own_count():
    def flops(documents, segments):
        tokens, pairs = sum(documents), sum(n * (n + 1) // 2 for n in documents)
        return 7 * tokens + 4 * pairs + 3 * sum(segments) + 5 * sum(p * p for p in segments)

    # n(n+1)/2 pairs at 4 each are 2 n^2 + 2 n
    assert PackCost.of(flops) == PackCost(9, 2, 3, 5)


def test_packs_of_like_cost_share_a_micro_step():
    packs = [pack(0, 5), pack(1, 9), pack(2, 5), pack(3, 8)]
    ordered = order_by_cost(packs, PackCost(1, 0, 0, 0))
    assert [entry.number for entry in ordered] == [1, 3, 0, 2]


def test_no_other_assignment_waits_less():
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.lognormal(0, 1, 6)
        best = min(imbalance(np.array(order).reshape(3, 2)) for order in permutations(costs))
        ordered = np.sort(costs)[::-1].reshape(3, 2)
        assert imbalance(ordered) == pytest.approx(best)
