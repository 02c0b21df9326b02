from __future__ import annotations

import pytest
import torch

from reprise.ops import fused_add_rms_norm

EPS = 1e-5
reference = fused_add_rms_norm.implementations["reference"].function


def test_reference_is_the_formula(randn) -> None:
    x, residual, weight = randn(4, 96), randn(4, 96), randn(96)
    total = x.double() + residual.double()
    expected = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    reference(x, residual, weight, EPS)
    torch.testing.assert_close(residual, total.float())
    torch.testing.assert_close(x, expected.float())


@pytest.mark.parametrize("shape", [(1, 7), (3, 128), (17, 96), (2, 4097), (0, 8)])
def test_triton(implementation, dtypes, randn, shape) -> None:
    triton = implementation(fused_add_rms_norm, "triton")
    for dtype in dtypes:
        x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
        weight = randn(shape[1], dtype=dtype)
        expected_x, expected_residual = x.clone(), residual.clone()
        reference(expected_x, expected_residual, weight, EPS)
        triton(x, residual, weight, EPS)
        # One addition and one rounding: nothing that could differ.
        if x.device.type != "cpu" or dtype == torch.float32:
            assert torch.equal(residual, expected_residual)
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(x, expected_x, rtol=max(2 * step, 2e-6), atol=1e-6)


def test_triton_leaves_memory_between_strided_rows_alone(implementation, randn) -> None:
    triton = implementation(fused_add_rms_norm, "triton")
    wide, residual, weight = randn(3, 20), randn(3, 12), randn(12)
    x = wide[:, 4:16]
    expected, untouched = x.clone(), wide.clone()
    reference(expected, residual.clone(), weight, EPS)
    triton(x, residual, weight, EPS)
    torch.testing.assert_close(x, expected)
    assert torch.equal(wide[:, :4], untouched[:, :4])
    assert torch.equal(wide[:, 16:], untouched[:, 16:])
