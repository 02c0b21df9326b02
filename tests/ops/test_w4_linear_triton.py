from __future__ import annotations

import pytest
import torch

from reprise import ops


@pytest.fixture
def triton(implementation):
    """The op's Triton function."""
    return lambda op: implementation(op, "triton")


SIZES = [(72, 512, 128), (40, 1152, 64), (24, 256, 32), (136, 768, 256), (8, 384, 384)]
ALONE = [
    (ops.w4_linear, rows, *sizes, with_zeros)
    for rows in (1, 2, 9, 16, 17)
    for sizes in SIZES
    for with_zeros in (False, True)
]
AROUND = [
    (op, rows, *sizes, with_zeros)
    for op in (ops.w4_norm_linear, ops.w4_norm_gated_linear, ops.w4_linear_add)
    for rows, sizes, with_zeros in (
        (1, SIZES[0], True), (1, SIZES[4], False), (9, SIZES[1], True), (17, SIZES[2], False),
        (1, (40, 4352, 128), True),  # programs with shares of the inputs
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "rows", "outputs", "inputs", "group", "with_zeros"),
    [*ALONE, *AROUND],
    ids=lambda each: getattr(each, "name", None),
)
def test_products(triton, randn, op, rows, outputs, inputs, group, with_zeros) -> None:
    """Groups of several sizes, tiles that are not full, strided rows of x, all numbers of rows that
    differ."""
    function, reference = triton(op), op.implementations["reference"].function
    dtype = torch.float16
    device = randn(1).device
    bits = torch.Generator().manual_seed(rows)
    words = torch.randint(256, (outputs, inputs // 2), generator=bits, dtype=torch.uint8)
    zeros = torch.randint(16, (outputs, inputs // group), generator=bits, dtype=torch.uint8)
    named = {
        "x": randn(rows, inputs + 16, dtype=dtype)[:, 8:-8],
        "packed": words.to(device).view(torch.int32),
        "scales": ((randn(outputs, inputs // group).abs() + 0.1) / (8 * inputs**0.5)).to(dtype),
        "zeros": zeros.to(device) if with_zeros else None,
        "bias": randn(outputs, dtype=dtype) if rows % 2 else None,
        "group": group,
    }
    if "norm" in op.name:
        named |= {"norm_weight": randn(inputs, dtype=dtype), "eps": 1e-6}
    if op is ops.w4_linear_add:
        named["residual"] = randn(rows, outputs, dtype=dtype)
    # The reference in float32: kernels of few rows round no weight.
    wide = {
        name: each.float() if isinstance(each, torch.Tensor) and each.dtype is dtype else each
        for name, each in named.items()
    }
    if op is ops.w4_linear_add:
        reference(**wide)
        function(**named)
        found, expected = named["residual"], wide["residual"]
    else:
        found, expected = function(**named), reference(**wide)
    assert found.dtype is dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), expected, rtol=6e-3, atol=6e-3)


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize(("inputs", "group"), [(384, 32), (4352, 128)])
def test_a_row_in_bfloat16(triton, randn, inputs, group, with_zeros) -> None:
    """Two numbers an instruction; inputs of several magnitudes, programs with shares of them. What
    is rounded before the result would be seen in sums of which little is left."""
    triton(ops.w4_linear)
    from reprise.ops.w4_linear.row_kernel import launch_row

    outputs, device = 24, randn(1).device
    x = randn(1, inputs, dtype=torch.bfloat16)
    x *= 2.0 ** (torch.arange(inputs, device=device) // 32 % 5 * 6)
    bits = torch.Generator().manual_seed(inputs)
    words = torch.randint(256, (outputs, inputs // 2), generator=bits, dtype=torch.uint8)
    zeros = torch.randint(16, (outputs, inputs // group), generator=bits, dtype=torch.uint8)
    packed, zero = words.to(device).view(torch.int32), zeros.to(device) if with_zeros else None
    scales = (randn(outputs, inputs // group).abs() + 0.1).to(torch.bfloat16)
    expected = ops.w4_linear.implementations["reference"].function(
        x.float(), packed, scales.float(), zero, None, group
    )
    out = torch.zeros(1, outputs, dtype=torch.float32, device=device)
    launch_row(x, packed, scales, zero, None, out, group)
    apart = (out - expected).norm() / expected.norm()
    assert apart < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "op", [ops.w4_linear, ops.w4_norm_linear, ops.w4_norm_gated_linear, ops.w4_linear_add],
    ids=lambda op: op.name,
)  # fmt: skip
def test_products_of_no_rows(triton, randn, op, dtype) -> None:
    """Of numbers, too, whose few rows other kernels multiply."""
    device = randn(1).device
    x = randn(1, 128, dtype=dtype)[:0]
    out = randn(1, 16, dtype=dtype)[:0]
    packed = torch.zeros(16, 16, device=device, dtype=torch.int32)
    around = (randn(128, dtype=dtype), 1e-6) if "norm" in op.name else ()
    around = (out,) if op is ops.w4_linear_add else around
    found = triton(op)(x, *around, packed, randn(16, 2, dtype=dtype), None, None, 64)
    if op is not ops.w4_linear_add:
        assert found.shape == (0, 8 if "gated" in op.name else 16)


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

    for inputs, group in ((200, 8), (256, 16), (384, 96), (256, 512)):
        assert accepts(randn(1, inputs), group=group) is not None
    for inputs, group in ((256, 32), (384, 64), (256, 128), (384, 384)):
        assert accepts(randn(1, inputs), group=group) is None
    assert accepts(randn(1, 512)[:, ::2], group=128) is not None


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("op", [ops.w4_linear, ops.w4_linear_add], ids=lambda each: each.name)
def test_rows_of_any_magnitude(triton, randn, op, alone) -> None:
    """As large and as small as bfloat16 is, in one row too: products are of float16."""
    function, reference = triton(op), op.implementations["reference"].function
    inputs, outputs, group = 512, 40, 64
    x = randn(6, inputs, dtype=torch.bfloat16)
    x[0] *= 2.0**100
    x[1] *= 2.0**-100
    x[2] = 0
    x[3, :100] *= 2.0**60
    x[3, 100:] *= 2.0**-60
    x[4, 1::2] *= 2.0**20  # within every step
    x[5, 7] = float("inf")
    bits = torch.Generator().manual_seed(3)
    words = torch.randint(256, (outputs, inputs // 2), generator=bits, dtype=torch.uint8)
    named = {
        "packed": words.to(x.device).view(torch.int32),
        "scales": (randn(outputs, inputs // group).abs() + 0.1).to(torch.bfloat16),
        "zeros": None,
        "bias": None,
        "group": group,
    }
    wide = {**named, "scales": named["scales"].float()}
    size = 1 if alone else 6
    if op is ops.w4_linear_add:
        found, expected = x.new_zeros(6, outputs), torch.zeros(6, outputs, device=x.device)
        for rows, results in zip(x.split(size), found.split(size), strict=True):
            function(rows, results, **named)
        reference(x.float(), expected, **wide)
    else:
        found = torch.cat([function(rows, **named) for rows in x.split(size)])
        expected = reference(x.float(), **wide)
    for row in range(5):
        most = float(expected[row].abs().max()) or 1.0
        torch.testing.assert_close(
            found[row].float() / most, expected[row] / most, rtol=6e-3, atol=6e-3
        )
    assert not found[5].isfinite().any()
