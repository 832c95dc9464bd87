"""Positions against a slow reference on 10,000 random layouts; rotary angles against float64."""

import math
import random

import pytest
import torch

from data_pipelines.pack.mrope import position_ids
from qwen2vl_train.model.rope import rotate, text_rotary, vision_rotary
from tests.numerics.slow_mrope import slow_position_ids

IMAGE, VIDEO, TEXT = 8, 9, 1


def random_layout(rng: random.Random):
    """Token ids, grids and borders of 1 to 4 documents of text, images and clips, some of them long, some adjacent."""
    ids: list[int] = []
    grids, borders = [], [0]
    for _ in range(rng.randint(1, 4)):
        kinds = rng.choices(["text", "image", "video"], k=rng.randint(1, 6))
        for previous, kind in zip(["start", *kinds], kinds, strict=False):
            if kind == "text":
                ids += [TEXT] * rng.randint(1, 9)
                continue
            if previous == kind:
                ids.append(TEXT)  # two media of one kind never touch: their end and start tags stand between them
            steps = 1 if kind == "image" else rng.choice([1, 2, 3, rng.randint(4, 30)])
            grid = (steps, 2 * rng.randint(1, 6), 2 * rng.randint(1, 6))
            grids.append(grid)
            ids += [IMAGE if kind == "image" else VIDEO] * (grid[0] * grid[1] * grid[2] // 4)
        borders.append(len(ids))
    return ids, grids, borders


def test_vectorised_positions_equal_the_papers_rule_on_ten_thousand_layouts():
    rng = random.Random(0)
    for number in range(10_000):
        ids, grids, borders = random_layout(rng)
        found = position_ids(torch.tensor(ids), grids, IMAGE, VIDEO, torch.tensor(borders, dtype=torch.int32))
        wanted = torch.tensor(slow_position_ids(ids, grids, IMAGE, VIDEO, borders))
        assert torch.equal(found, wanted), f"layout {number}: {grids}, borders {borders}"


def test_the_slow_reference_gives_the_hand_computed_example():
    ids = [TEXT, TEXT, *[IMAGE] * 6, TEXT, TEXT, TEXT, *[VIDEO] * 8, TEXT, TEXT]
    t, h, w = slow_position_ids(ids, [(1, 4, 6), (2, 4, 4)], IMAGE, VIDEO, [0, 21])
    assert t == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 11]
    assert h == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 8, 9, 9, 8, 8, 9, 9, 10, 11]
    assert w == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9, 8, 9, 8, 9, 10, 11]


def test_one_dimensional_positions_count_tokens():
    ids = torch.tensor([TEXT, *[IMAGE] * 4, TEXT, TEXT])
    found = position_ids(ids, [(1, 4, 4)], IMAGE, VIDEO, torch.tensor([0, 6, 7]), one_dimensional=True)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 0]] * 3


def test_text_pairs_turn_by_time_row_and_column_in_their_sections():
    # position (t, h, w) = (3, 50, 700); 64 pairs: 0-15 follow t, 16-39 h, 40-63 w
    cos, sin = text_rotary(torch.tensor([[3], [50], [700]]), 1e6, (16, 24, 24))
    for pair, position in ((0, 3), (15, 3), (16, 50), (39, 50), (40, 700), (63, 700)):
        angle = position * 1e6 ** (-2 * pair / 128)
        assert float(cos[0, 0, pair]) == pytest.approx(math.cos(angle), abs=1e-5)
        assert float(cos[0, 0, pair + 64]) == pytest.approx(math.cos(angle), abs=1e-5)
        assert float(sin[0, 0, pair + 64]) == pytest.approx(math.sin(angle), abs=1e-5)


def test_vision_pairs_turn_by_row_then_column():
    # head size 8: 4 pairs, frequencies 1 and 10000^(-1/2) = 0.01; the first two follow the row 5, the others column 7
    cos, _ = vision_rotary(torch.tensor([[5, 7]]), 10_000.0, 8)
    wanted = [math.cos(angle) for angle in (5.0, 0.05, 7.0, 0.07)]
    assert cos[0, 0].tolist() == pytest.approx(wanted * 2, abs=1e-6)


def test_rotation_equals_complex_multiplication_and_turns_gradients_back():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 16, generator=generator, dtype=torch.float32, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 9, 16_000]] * 3)
    rotary = text_rotary(positions, 1e6, (2, 3, 3))
    frequencies = torch.tensor([1e6 ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
    turns = torch.polar(torch.ones(5, 8, dtype=torch.float64), positions[0, :, None] * frequencies)[:, None]
    wanted = torch.complex(x[..., :8].double(), x[..., 8:].double()) * turns
    out = rotate(x, rotary)
    # float32 angles at position 16,000 carry an error of 16,000 * 2^-24 = 0.001 rad
    assert torch.allclose(out.double(), torch.cat((wanted.real, wanted.imag), -1), atol=5e-3)
    assert torch.allclose(out[:4].double(), torch.cat((wanted.real, wanted.imag), -1)[:4], atol=1e-5)
    weight = torch.randn(5, 3, 16, generator=generator)
    (out * weight).sum().backward()
    (wanted_grad,) = torch.autograd.grad((torch.cat((wanted.real, wanted.imag), -1) * weight).sum(), x)
    assert torch.allclose(x.grad[:4], wanted_grad[:4].float(), atol=1e-5)
