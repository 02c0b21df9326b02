from __future__ import annotations

import pytest
import torch

from reprise.ops import sigmoid_and_mul

reference = sigmoid_and_mul.implementations["reference"].function


def test_reference_is_the_formula(randn) -> None:
    x, gate = randn(4, 96), randn(4, 96)
    expected = x.double() / (1 + (-gate.double()).exp())
    torch.testing.assert_close(reference(x, gate), expected.float())


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("each", [True, False])
def test_triton(implementation, dtypes, randn, rows, each) -> None:
    """More channels than a program has; gates are columns of what is wider."""
    triton = implementation(sigmoid_and_mul, "triton")
    for dtype in dtypes:
        x, wide = randn(rows, 1500, dtype=dtype), 4 * randn(rows, 1601, dtype=dtype)
        gate = wide[:, 7 : 7 + (1500 if each else 1)]
        found = triton(x, gate)
        assert found.is_contiguous()
        step = torch.finfo(dtype).eps
        tolerance = {"rtol": max(2 * step, 2e-6), "atol": 1e-6}
        torch.testing.assert_close(found, reference(x, gate), **tolerance)


def test_triton_reads_strided_rows(implementation, randn) -> None:
    triton = implementation(sigmoid_and_mul, "triton")
    x, gate = randn(3, 40)[:, 5:29], randn(3, 48)[:, ::2]
    torch.testing.assert_close(triton(x, gate), reference(x, gate))
    torch.testing.assert_close(triton(x.T, gate.T), reference(x.T, gate.T))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_gate_that_is_shut_or_open(implementation, platform) -> None:
    triton = implementation(sigmoid_and_mul, "triton")
    gate = torch.tensor([[-1e4], [0.0], [1e4]], device=platform.device)
    x = torch.full((3, 2), 3.0, device=platform.device)
    assert triton(x, gate).tolist() == [[0.0] * 2, [1.5] * 2, [3.0] * 2]
