"""Which ranks have a launcher that answers for them, and when it is gone."""

import os

import pytest

from qwen2vl_train.training.launcher import Launcher, find_launcher


@pytest.fixture
def alone(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, "the deepspeed launcher"),
    ],
)
def test_a_launchers_rank_knows_its_process(alone, found, name):
    for key, value in found.items():
        alone.setenv(key, value)
    assert find_launcher() == Launcher(name, os.getppid())
    assert not find_launcher().is_gone


@pytest.mark.parametrize("found", [{}, {"SLURM_PROCID": "0", "RANK": "0"}, {"CROSS_RANK": "0"}], ids=str)
def test_a_rank_started_by_hand_or_by_slurm_outlives_its_shell(alone, found):
    for key, value in found.items():
        alone.setenv(key, value)
    assert find_launcher() is None


def test_an_orphan_has_another_parent():
    assert Launcher("torchrun", os.getppid() + 1).is_gone
