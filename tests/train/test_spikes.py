"""What counts as a loss spike, by hand, and what is written down of one."""

from types import SimpleNamespace

import pytest
import torch

from qwen2vl_train.config import GuardConfig
from qwen2vl_train.training.spikes import Spike, SpikeGuard, find_spike
from qwen2vl_train.training.world import World

CONFIG = GuardConfig(spike_sigma=5, spike_window=8)
BEFORE = [2.0, 2.2, 2.0, 2.2]  # mean 2.1, deviation 0.1: the limit is 2.6


@pytest.mark.parametrize(("loss", "is_spike"), [(2.59, False), (2.61, True), (1.0, False)])
def test_a_spike_lies_so_many_deviations_over_the_mean(loss, is_spike):
    assert (find_spike(5, loss, BEFORE, CONFIG) is not None) == is_spike


def test_half_a_window_of_losses_is_needed_to_judge():
    assert find_spike(4, 99.0, BEFORE[:3], CONFIG) is None
    assert str(find_spike(5, 99.0, BEFORE, CONFIG)) == "step 5: the loss jumped to 99 from 2.1 ± 0.1"


def test_on_a_plateau_a_hundredth_of_the_mean_counts_as_the_deviation():
    """Four times 2.0: the limit is 2.0 + 5 * 0.02."""
    assert find_spike(5, 2.09, [2.0] * 4, CONFIG) is None
    assert find_spike(5, 2.11, [2.0] * 4, CONFIG) is not None


def test_on_a_full_disk_the_lines_of_spikes_are_lost_with_one_warning(tmp_path):
    class Alone(World):
        def gather(self, item):
            return [item]

    said = []
    (tmp_path / "spikes.jsonl").symlink_to("/dev/full")
    guard = SpikeGuard(CONFIG, tmp_path, Alone(0, 1, 0, torch.device("cpu")), said.append)
    for rollbacks in (1, 2):
        guard.record(Spike(6, 9.0, 2.1, 0.1), [SimpleNamespace(number=5, keys=("key",))], 4, rollbacks)
    assert len(said) == 1
    assert f"{tmp_path}/spikes.jsonl cannot be written, training goes on" in said[0]
