"""What the guard keeps of skipped updates, in memory and on disk; packs and steps are stand-ins."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from qwen2vl_train.config import GuardConfig
from qwen2vl_train.training.guard import Guard, NonFiniteError
from qwen2vl_train.training.step import StepResult
from qwen2vl_train.training.window import Progress
from qwen2vl_train.training.world import World


class Alone(World):
    """A world of one without a process group."""

    def gather(self, item):
        return [item]


ALONE = Alone(0, 1, 0, torch.device("cpu"))


def take(guard, progress, skipped):
    """One more step of one pack."""
    progress.step += 1
    losses = torch.tensor([float("nan") if skipped else 2.0])
    result = StepResult(skipped=skipped, stop=False, supervised=5, tokens=9, losses=losses)
    guard.check(result, [SimpleNamespace(number=progress.step, keys=(f"key-{progress.step}",))], progress)


def test_on_a_full_disk_a_skipped_update_is_counted_and_its_lines_are_lost_with_one_warning(tmp_path):
    said, progress = [], Progress()
    record = tmp_path / "skipped_updates.jsonl"
    record.symlink_to("/dev/full")
    guard = Guard(GuardConfig(max_skipped_in_row=3), tmp_path, ALONE, said.append)
    for skipped in (True, False, True, True):
        take(guard, progress, skipped)
    assert progress.skipped_updates == 3
    (warning,) = said
    assert warning.startswith(f"{record} cannot be written, training goes on (")
    record.unlink()  # there is room again
    with pytest.raises(NonFiniteError, match="3 times in a row and 4 times in this stage"):
        take(guard, progress, True)
    assert [json.loads(line)["step"] for line in record.read_text().splitlines()] == [5]


def test_a_row_of_skipped_updates_is_counted_on_by_a_resumed_run(tmp_path):
    """A run that is killed every few steps would else never come to the limit."""
    progress = Progress()
    for skipped in (True, False, True, True):
        take(Guard(GuardConfig(), tmp_path, ALONE, print), progress, skipped)
    resumed = Progress(**json.loads(json.dumps(asdict(progress))))
    with pytest.raises(NonFiniteError, match="3 times in a row and 4 times in this stage"):
        take(Guard(GuardConfig(max_skipped_in_row=3), tmp_path, ALONE, print), resumed, True)


def test_a_rollback_undoes_steps_but_no_skipped_update(tmp_path):
    """As of a checkpoint at step 1: the packs of step 2 are not trained again, so its line in the record stays, too."""
    progress = Progress()
    guard = Guard(GuardConfig(max_skipped=2), tmp_path, ALONE, print)
    take(guard, progress, False)
    saved = asdict(progress)
    for skipped in (True, False):
        take(guard, progress, skipped)
    returned = progress.rolled_back(saved)
    assert (returned.step, returned.rollbacks, returned.skipped_updates, returned.skipped_in_row) == (1, 1, 1, 0)
    with pytest.raises(NonFiniteError, match="1 times in a row and 2 times in this stage"):
        take(guard, returned, True)
