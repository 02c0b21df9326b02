from __future__ import annotations

import pytest
import torch

from reprise import ops


@pytest.fixture
def triton(implementation):
    """The op's Triton function."""
    return lambda op: implementation(op, "triton")


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9, 16, 17])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [(72, 512, 128), (40, 1152, 64), (24, 256, 32), (136, 768, 256), (8, 384, 384)],
)
def test_products(triton, randn, outputs, inputs, group, rows, with_zeros) -> None:
    """Groups of several sizes, tiles that are not full, strided rows of x, all numbers of rows that
    differ."""
    dtype = torch.float16
    device = randn(1).device
    bits = torch.Generator().manual_seed(rows)
    words = torch.randint(256, (outputs, inputs // 2), generator=bits, dtype=torch.uint8)
    zeros = torch.randint(16, (outputs, inputs // group), generator=bits, dtype=torch.uint8)
    x = randn(rows, inputs + 16, dtype=dtype)[:, 8:-8]
    packed = words.to(device).view(torch.int32)
    scales = ((randn(outputs, inputs // group).abs() + 0.1) / (8 * inputs**0.5)).to(dtype)
    middle = zeros.to(device) if with_zeros else None
    bias = randn(outputs, dtype=dtype) if rows % 2 else None
    found = triton(ops.w4_linear)(x, packed, scales, middle, bias, group)
    # The reference in float32: kernels of few rows round no weight.
    wide_bias = None if bias is None else bias.float()
    reference = ops.w4_linear.implementations["reference"].function
    expected = reference(x.float(), packed, scales.float(), middle, wide_bias, group)
    assert found.dtype is dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=6e-3, atol=6e-3)


def test_a_plain_weight_is_the_reference_s(triton, randn) -> None:
    triton(ops.w4_linear)
    from reprise.ops.w4_linear.dequantise_kernel import dequantise
    from reprise.ops.w4_linear.reference import dequantise as expected

    words = torch.arange(256, dtype=torch.uint8).repeat(5, 1).view(torch.int32).to(randn(1).device)
    scales = randn(5, 8, dtype=torch.float16)
    zeros = torch.arange(40, dtype=torch.uint8).view(5, 8).to(words.device) % 16
    for each in (None, zeros):
        found = dequantise(words, scales, each, 64)
        assert torch.equal(found, expected(words, scales, each, 64, 512))


def test_what_it_refuses(randn) -> None:
    from reprise.ops.w4_linear.accepts import accepts

    def refused(inputs: int, group: int) -> str | None:
        return accepts(randn(1, inputs), randn(1), randn(1), None, None, group)

    for inputs, group in ((200, 8), (256, 16), (384, 96), (256, 512)):
        assert refused(inputs, group) is not None
    for inputs, group in ((256, 32), (384, 64), (256, 128), (384, 384)):
        assert refused(inputs, group) is None
