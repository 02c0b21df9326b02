from __future__ import annotations

import pytest
import torch

from reprise.ops import rms_norm

EPS = 1e-6
reference = rms_norm.implementations["reference"].function


def test_reference_is_the_formula(randn) -> None:
    x, weight = randn(5, 96), randn(96)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    torch.testing.assert_close(reference(x, weight, EPS), expected.float())


def test_reference_rounds_like_the_published_models(randn) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, weight = randn(7, 3, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16)
    oracle = Qwen3RMSNorm(64, eps=EPS).to(x.device, x.dtype)
    oracle.weight.data.copy_(weight)
    assert torch.equal(reference(x, weight, EPS), oracle(x))


def test_a_float32_gain_multiplies_before_anything_is_rounded(randn) -> None:
    """As gains around 1 that are stored as their distance from it."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    x, distance = randn(7, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16) / 8
    oracle = Qwen3NextRMSNorm(64, eps=EPS).to(x.device, x.dtype)
    oracle.weight.data.copy_(distance)
    assert torch.equal(reference(x, 1 + distance.float(), EPS), oracle(x))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 128), (2, 3, 96), (1, 4097), (2, 0, 8)])
def test_triton(implementation, dtypes, randn, shape) -> None:
    triton = implementation(rms_norm, "triton")
    for dtype in dtypes:
        x = randn(*shape, dtype=dtype)
        for gain in {dtype, torch.float32}:
            weight = randn(shape[-1], dtype=gain)
            found = triton(x, weight, EPS)
            assert found.dtype == dtype
            assert_rounds_alike(found, reference(x, weight, EPS))


def test_triton_reads_heads_of_a_fused_projection(implementation, dtypes, randn) -> None:
    triton = implementation(rms_norm, "triton")
    for dtype in dtypes:
        heads = randn(3, 9 * 64, dtype=dtype).view(3, 9, 64)[:, 2:7]
        weight = randn(64, dtype=dtype)
        found = triton(heads, weight, EPS)
        assert found.is_contiguous()
        assert_rounds_alike(found, reference(heads, weight, EPS))


def test_triton_takes_any_strides(implementation, randn) -> None:
    triton = implementation(rms_norm, "triton")
    weight = randn(8)
    for x in (randn(8, 5).T, randn(2, 3, 4, 8)[:, ::2], randn(3, 5, 16)[..., ::2], randn(8)):
        torch.testing.assert_close(triton(x, weight, EPS), reference(x, weight, EPS))


def test_a_row_does_not_depend_on_its_neighbours(implementation, randn) -> None:
    triton = implementation(rms_norm, "triton")
    x, weight = randn(9, 64), randn(64)
    poisoned = x.clone()
    poisoned[:8] = torch.nan
    assert torch.equal(triton(poisoned, weight, EPS)[8], triton(x[8:], weight, EPS)[0])


def assert_rounds_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bit of the mean, which moves few values by one rounding step."""
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=max(2 * step, 2e-6), atol=1e-6)
