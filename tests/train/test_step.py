"""What a step brings to the device and back: nothing that makes the host wait."""

import pytest
import torch

from qwen2vl_train.training import step
from qwen2vl_train.training.step import to_device


def test_counts_are_exact_beyond_the_whole_numbers_of_float32():
    found = to_device((2**24 + 1, 3), torch.device("cpu"))
    assert (found.dtype, found.tolist()) == (torch.float64, [2**24 + 1, 3])


def test_counts_leave_for_cuda_from_pinned_memory_without_waiting(monkeypatch):
    asked = {}

    class Made:
        def to(self, device, **how):
            asked.update(device=device, **how)

    def make(values, dtype, **how):
        asked.update(how)
        return Made()

    monkeypatch.setattr(step.torch, "tensor", make)
    to_device((1, 2), torch.device("cuda"))
    assert asked == {"pin_memory": True, "device": torch.device("cuda"), "non_blocking": True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_host_does_not_wait_for_the_counts_and_each_copy_keeps_its_own():
    device = torch.device("cuda")
    to_device((0, 0), device)  # pinned memory is taken from the system once
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(100_000_000)  # the copies wait in line; their sources are freed meanwhile
        sent = [to_device((number, -number), device) for number in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [counts.tolist() for counts in sent] == [[number, -number] for number in range(50)]
