"""Packs brought to the device: in order, one ahead."""

import pytest
import torch

from qwen2vl_train.training.ahead import DeviceFeed, one_ahead
from tests.distributed.packs import uneven_packs


def test_the_next_copy_starts_before_a_pack_is_computed_and_after_that_pack_has_arrived():
    said = []
    feed = one_ahead("abc", lambda pack: said.append(f"start {pack}") or pack, lambda pack: said.append(f"wait {pack}"))
    assert said == ["start a"]
    for pack, _ in feed:
        said.append(f"compute {pack}")
    assert said == [
        "start a", "wait a", "start b", "compute a", "wait b", "start c", "compute b", "wait c", "compute c",
    ]  # fmt: skip


def test_a_step_without_packs_has_none():
    assert list(DeviceFeed(torch.device("cpu")).batches([])) == []


def test_on_the_cpu_the_packs_are_used_where_they_lie():
    packs = uneven_packs(3)
    fed = list(DeviceFeed(torch.device("cpu")).batches(packs))
    assert [host is pack for (host, _), pack in zip(fed, packs, strict=True)] == [True] * 3
    assert all(batch.input_ids is pack.input_ids for (_, batch), pack in zip(fed, packs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_each_pack_arrives_whole_while_the_device_computes():
    packs = [pack.pin_memory() for pack in uneven_packs(6)]
    busy = torch.ones(4096, 4096, device="cuda")
    for pack, batch in DeviceFeed(torch.device("cuda")).batches(packs):
        busy = busy @ busy / 4096
        assert torch.equal(batch.input_ids.cpu(), pack.input_ids)
        assert torch.equal(batch.image_patches.cpu(), pack.image_patches)
