"""The trainer's option `model.compile`: compiled blocks train under ZeRO-3 as plain ones, whatever the packs hold."""

import pytest
import torch

from tests.distributed.launch import metrics, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    finished = train(2, folder, steps=4, packs=4, mix=True, optimizer="sgd")
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_train_as_plain_ones_on_two_ranks(plain, tmp_path, backend):
    finished = train(2, tmp_path, steps=4, packs=4, mix=True, optimizer="sgd", compile=backend)
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert f"blocks are compiled by {backend}" in finished.stdout + finished.stderr
    ours, theirs = metrics(tmp_path), metrics(plain)
    assert ours.keys() == theirs.keys() == {1, 2, 3, 4}
    for step, line in theirs.items():
        # inductor fuses sums in another order: float32 rounding
        assert ours[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)
    weights, wanted = torch.load(tmp_path / "weights.pt"), torch.load(plain / "weights.pt")
    for name, value in wanted.items():
        assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), name
