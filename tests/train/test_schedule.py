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
