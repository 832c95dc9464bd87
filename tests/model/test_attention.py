"""The attention interface: the reference against a masked product, and the kernel's adapter on both spellings."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from qwen2vl_train.model import attention
from qwen2vl_train.model.attention import Run, attend, make_segments, resolve_backend


def borders(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def masked(query, key, value, lengths, causal):
    """One dense product over the whole sequence, with a mask that separates the segments."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = document[:, None] == document[None]
    if causal:
        mask &= torch.ones_like(mask).tril()
    repeat = query.shape[1] // key.shape[1]
    q, k, v = query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [4, 4, 9, 2, 2], [3, 0, 7]])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_the_reference_equals_masked_attention(causal, lengths, heads, key_heads):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    query = torch.randn(tokens, heads, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(tokens, key_heads, 8, generator=generator, requires_grad=True) for _ in range(2))
    segments = make_segments(borders(*lengths), max(lengths), "reference")
    found = attend(query, key, value, segments, causal)
    wanted = masked(query, key, value, lengths, causal)
    assert torch.allclose(found, wanted, atol=1e-5)
    weight = torch.randn(found.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (found, wanted))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_neighbours_of_equal_length_share_a_call():
    segments = make_segments(borders(4, 4, 9, 0, 4), 9, "reference")
    assert segments.runs == (Run(0, 2, 4), Run(8, 1, 9), Run(17, 1, 4))


def test_the_backend_follows_device_and_dtype():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_backend("auto", cpu, torch.bfloat16) == "reference"
    assert resolve_backend("auto", cuda, torch.bfloat16) == "varlen"
    assert resolve_backend("auto", cuda, torch.float32) == "reference"
    assert resolve_backend("reference", cuda, torch.bfloat16) == "reference"
    with pytest.raises(ValueError, match="needs CUDA and bf16 or fp16, found cpu"):
        resolve_backend("varlen", cpu, torch.bfloat16)


def kernel_of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return kernel(query, key, value, cu_seq_q, max_q, window_size == (-1, 0), scale)


def kernel_of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return kernel(query, key, value, cu_seq_q, max_q, window_size == (-1, 0), scale)


def kernel(query, key, value, cu_seqlens, longest, causal, scale):
    """What flash attention demands and computes."""
    assert query.shape[-1] % 8 == 0
    assert cu_seqlens.dtype == torch.int32
    assert longest == int(cu_seqlens.diff().max())
    query = query * (scale * query.shape[-1] ** 0.5)
    return masked(query, key, value, cu_seqlens.diff().tolist(), causal)


@pytest.mark.parametrize("release", [kernel_of_2_11, kernel_of_2_13])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 16), (4, 4, 80), (2, 2, 20)])
def test_the_adapter_speaks_every_releases_language(monkeypatch, release, causal, heads, key_heads, size):
    monkeypatch.setattr(attention, "varlen_attn", release)
    monkeypatch.setattr(attention, "_SAYS_GROUPED", release is kernel_of_2_13)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(11, heads, size, generator=generator)
    key, value = (torch.randn(11, key_heads, size, generator=generator) for _ in range(2))
    found = attend(query, key, value, make_segments(borders(7, 4), 7, "varlen"), causal)
    assert torch.allclose(found, masked(query, key, value, [7, 4], causal), atol=1e-5)


def test_the_adapter_compiles_to_one_graph(monkeypatch):
    def product(query, key, value, *borders, scale, window_size, enable_gqa=False):
        return query * scale + key.mean() + value.sum()

    monkeypatch.setattr(attention, "varlen_attn", product)
    query, key = torch.ones(11, 4, 16), torch.ones(11, 2, 16)
    segments = make_segments(borders(7, 4), 7, "varlen")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")  # it would trace what looks the arguments up
        explained = torch._dynamo.explain(lambda q, k: attend(q, k, k, segments, True))(query, key)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("heads", "key_heads", "size", "causal"), [(16, 16, 80, False), (12, 2, 128, True)])
def test_varlen_equals_the_reference_on_cuda(heads, key_heads, size, causal):
    lengths = [700, 33, 1, 290]
    inputs = [
        torch.randn(1024, count, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    both = [
        attend(*inputs, make_segments(borders(*lengths).cuda(), 700, backend), causal)
        for backend in ("varlen", "reference")
    ]
    # bf16 keeps 8 bits; both kernels add up in float32
    assert (both[0] - both[1]).float().norm() / both[1].float().norm() < 2.0**-7
    ours, theirs = (torch.autograd.grad(out.float().square().sum(), inputs) for out in both)
    for first, second in zip(ours, theirs, strict=True):
        assert (first - second).float().norm() / second.float().norm() < 2.0**-6
