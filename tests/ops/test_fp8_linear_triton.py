from __future__ import annotations

import pytest
import torch

from reprise import ops
from reprise.ops.fp8_linear.reference import quantise as quantised_as_reference


@pytest.fixture
def triton(implementation):
    """The op's Triton function."""
    return lambda op: implementation(op, "triton")


@pytest.mark.parametrize(("inputs", "group"), [(384, 128), (3072, 128), (1536, 1536)])
def test_the_same_eight_bits_as_the_reference(triton, randn, inputs, group) -> None:
    triton(ops.fp8_linear)
    from reprise.ops.fp8_linear.quantise_kernel import quantise

    # From numbers that round to zero up to those at the end of the range, ties among them.
    x = randn(6, inputs) * torch.logspace(-9, 3, 6, device=randn(1).device)[:, None]
    x[1] = (x[1] * 64).round() / 64
    x[2, :group] = 0
    numbers, scales = quantise(x, group, False)
    expected, expected_scales = quantised_as_reference(x, group)
    assert torch.equal(scales.t(), expected_scales)
    assert torch.equal(numbers, expected.float())


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 65])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block_n"),
    [(200, 512, 128), (96, 1024, 32), (112, 384, 1), (64, 128, 64)],
)
def test_products(triton, randn, outputs, inputs, block_n, rows) -> None:
    """Blocks that are cut off, parts smaller than a block, channels; strided rows of x."""
    block_k = inputs if block_n == 1 else 128
    named = {
        "x": randn(rows, inputs + 16)[:, 8:-8],
        "weight": randn(outputs, inputs).to(torch.float8_e4m3fn),
        "scale": (randn(-(-outputs // block_n), inputs // block_k).abs() + 0.1) / inputs**0.5,
        "bias": randn(outputs) if rows % 2 else None,
        "block_n": block_n,
        "block_k": block_k,
    }
    found = triton(ops.fp8_linear)(**named)
    expected = ops.fp8_linear.implementations["reference"].function(**named)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_it_refuses(randn) -> None:
    from reprise.ops.fp8_linear.accepts import accepts

    weight, scale = randn(4, 256), randn(4, 1)
    assert accepts(randn(1, 200), weight, scale, None, 128, 128) is not None
    assert accepts(randn(1, 256), weight, scale, None, 128, 64) is not None
    assert accepts(randn(1, 256), weight, scale, None, 128, 128) is None
    assert accepts(randn(1, 256), weight, scale, None, 1, 256) is None
