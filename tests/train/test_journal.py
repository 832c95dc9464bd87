"""What a log says of all ranks, from one process that plays two."""

from collections import Counter

import pytest
import torch

from data_pipelines.config import DataConfig, PlanConfig, SourceConfig
from qwen2vl_train.config import LearningRates, OptimConfig, StageConfig
from qwen2vl_train.training.journal import Journal
from qwen2vl_train.training.window import Progress, Window
from qwen2vl_train.training.world import World
from tests.distributed.packs import CONFIG, uneven_packs


class TwoRanks(World):
    """Rank 0 of two; `other` is what rank 1 sends."""

    other: Window

    def sum(self, tensor):
        return tensor

    def gather(self, item):
        return [item, self.other]


class StillEngine:
    dtype = torch.float32

    def gradient_norm(self):
        return 1.0

    def rates(self):
        return {}


class Recorded:
    """In the monitor's place."""

    def log(self, stage, step, metrics):
        self.metrics = metrics

    def advance(self, done, note):
        self.note = note


@pytest.fixture
def journal(tmp_path):
    world = TwoRanks(0, 2, 0, torch.device("cpu"))
    sources = {name: SourceConfig(("x.tar",)) for name in ("even", "odd")}
    stage = StageConfig(
        ("llm",), 10, 4, OptimConfig(LearningRates(1, 1, 1)), DataConfig(sources, plan=PlanConfig(max_tokens=256))
    )
    wanted = {0: {"even": 0.25, "odd": 0.75}}
    made = Journal(stage, "main", tmp_path, CONFIG, ("even", "odd"), wanted.__getitem__, world, Recorded())
    object.__setattr__(world, "other", Window(("even", "odd")))
    return made


def test_the_data_wait_is_the_slowest_ranks(journal):
    journal.count(uneven_packs(2))
    journal.window._start -= 10.0
    journal.window.wait_s, journal._world.other.wait_s = 0.5, 4.0
    progress = Progress()
    journal.log(StillEngine(), progress)
    assert journal._monitor.metrics["data_wait_share"] == pytest.approx(0.4, rel=0.1)
    assert progress.wait_s == 4.0


def test_the_mixture_that_was_got_stands_beside_the_one_that_was_wanted(journal):
    """Of 10 samples of both ranks, 4 are even: two of the four here and two of rank 1's six."""
    journal.count(uneven_packs(2))  # pack 0: two documents of dataset 0, pack 1: two of dataset 1
    journal._world.other.documents = Counter({"even": 2, "odd": 4})
    journal.log(StillEngine(), Progress())
    mixture = {name: value for name, value in journal._monitor.metrics.items() if name.startswith("mixture/")}
    assert mixture == {
        "mixture/even": pytest.approx(0.4),
        "mixture/odd": pytest.approx(0.6),
        "mixture/even.wanted": 0.25,
        "mixture/odd.wanted": 0.75,
    }


def test_a_window_without_a_sample_has_no_mixture(journal):
    journal.count([])
    journal.log(StillEngine(), Progress())
    assert not [name for name in journal._monitor.metrics if name.startswith("mixture/")]
