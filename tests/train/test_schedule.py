"""Learning-rate schedule, by hand."""

import pytest

from qwen2vl_train.config import ScheduleConfig
from qwen2vl_train.training.schedule import rate_factor


def factors(config, steps):
    return [rate_factor(step, steps, config) for step in range(steps)]


def test_warmup_rises_to_the_peak_and_linear_decay_ends_at_the_floor():
    config = ScheduleConfig("linear", warmup_steps=3, min_ratio=0.2)
    assert factors(config, 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_halfway_between_peak_and_floor_in_the_middle():
    config = ScheduleConfig("cosine", warmup_steps=0, min_ratio=0.1)
    assert factors(config, 3) == pytest.approx([1.0, 0.55, 0.1])


def test_constant_stays_at_the_peak():
    assert factors(ScheduleConfig("constant", warmup_steps=1), 3) == pytest.approx([0.5, 1.0, 1.0])


def test_a_single_step_trains_at_the_peak():
    assert factors(ScheduleConfig("cosine"), 1) == [1.0]


def test_in_tokens_a_step_counts_as_its_capacity_and_fuller_or_emptier_packs_move_the_rate():
    """Steps of about 100 tokens, warm-up 200, length 1,000: the decay ends where the last full step begins, at 900."""
    config = ScheduleConfig("linear", warmup_tokens=200, min_ratio=0.0)
    done = [0, 100, 190, 290, 550, 900, 990]
    found = [rate_factor(tokens, 1000, config, unit=100) for tokens in done]
    assert found == pytest.approx([100 / 300, 200 / 300, 290 / 300, 610 / 700, 0.5, 0.0, 0.0])


def test_in_tokens_full_packs_give_the_schedule_in_steps():
    in_steps = ScheduleConfig("cosine", warmup_steps=3, min_ratio=0.1)
    in_tokens = ScheduleConfig("cosine", warmup_tokens=300, min_ratio=0.1)
    assert [rate_factor(100 * step, 1000, in_tokens, unit=100) for step in range(10)] == factors(in_steps, 10)
