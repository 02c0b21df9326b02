from __future__ import annotations

import pytest
import torch

from reprise.ops import silu_and_mul

reference = silu_and_mul.implementations["reference"].function


def test_reference_is_the_formula(randn) -> None:
    x = randn(4, 2 * 96)
    gate, up = x.double()[:, :96], x.double()[:, 96:]
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(reference(x), expected.float())


@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (17, 2 * 96), (2, 2 * 1500), (2, 3, 8), (0, 8)])
def test_triton(implementation, dtypes, randn, shape) -> None:
    triton = implementation(silu_and_mul, "triton")
    for dtype in dtypes:
        x = randn(*shape, dtype=dtype)
        found, expected = triton(x), reference(x)
        assert found.is_contiguous()
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=max(2 * step, 2e-6), atol=1e-6)


def test_triton_reads_strided_rows(implementation, randn) -> None:
    triton = implementation(silu_and_mul, "triton")
    x = randn(3, 40)[:, 5:29]
    torch.testing.assert_close(triton(x), reference(x))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_neither_overflow_nor_vanish(implementation, platform) -> None:
    triton = implementation(silu_and_mul, "triton")
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    x = torch.cat((gate, torch.full_like(gate, 2.0))).unsqueeze(0).to(platform.device)
    assert triton(x).tolist() == [[0.0, pytest.approx(-7.4e-42, abs=1e-41), 0.0, 200.0, 2e4]]
