from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from reprise import ops
from reprise.ops.fp8_linear.reference import quantise as quantised_as_reference


@pytest.fixture
def triton(implementation):
    """The op's Triton function."""
    return lambda op: implementation(op, "triton")


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("inputs", "group"), [(384, 128), (3072, 128), (1536, 1536)])
def test_the_same_eight_bits_as_the_reference(triton, randn, inputs, group, with_norm) -> None:
    triton(ops.fp8_linear)
    from reprise.ops.fp8_linear.quantise_kernel import quantise

    # From numbers that round to zero up to those at the end of the range, ties among them.
    x = randn(6, inputs) * torch.logspace(-9, 3, 6, device=randn(1).device)[:, None]
    x[1] = (x[1] * 64).round() / 64
    x[2, :group] = 0
    gain = randn(inputs) if with_norm else None
    numbers, scales = quantise(x, group, False, gain, 1e-6)
    normed = x if gain is None else ops.rms_norm(x, gain, 1e-6)
    expected, expected_scales = quantised_as_reference(normed, group)
    torch.testing.assert_close(scales.t(), expected_scales, rtol=1e-6 if with_norm else 0, atol=0)
    differ = (numbers != expected.float()).float().mean()
    assert differ <= (1e-3 if with_norm else 0)  # sums of squares may be ordered otherwise


SIZES = [(200, 512, 128), (96, 1024, 32), (112, 384, 1), (64, 128, 64)]
ALONE = [(ops.fp8_linear, rows, *sizes) for rows in (1, 2, 16, 17, 65) for sizes in SIZES]
AROUND = [
    (op, rows, *sizes)
    for op in (ops.fp8_norm_linear, ops.fp8_norm_gated_linear, ops.fp8_linear_add)
    for rows, sizes in ((2, SIZES[0]), (17, SIZES[2]), (1, SIZES[1]))
]


@pytest.mark.parametrize(
    ("op", "rows", "outputs", "inputs", "block_n"),
    [*ALONE, *AROUND],
    ids=lambda each: getattr(each, "name", None),
)
def test_products(triton, randn, op, rows, outputs, inputs, block_n) -> None:
    """Blocks that are cut off, parts smaller than a block, channels; strided rows of x."""
    function, reference = triton(op), op.implementations["reference"].function
    block_k = inputs if block_n == 1 else 128
    named = {
        "x": randn(rows, inputs + 16)[:, 8:-8],
        "weight": randn(outputs, inputs).to(torch.float8_e4m3fn),
        "scale": (randn(-(-outputs // block_n), inputs // block_k).abs() + 0.1) / inputs**0.5,
        "bias": randn(outputs) if rows % 2 else None,
        "block_n": block_n,
        "block_k": block_k,
    }
    if "norm" in op.name:
        named |= {"norm_weight": randn(inputs), "eps": 1e-6}
    if op is ops.fp8_linear_add:
        named["residual"] = randn(rows, outputs)
    cloned = {k: v.clone() if k == "residual" else v for k, v in named.items()}
    found, expected = function(**named), reference(**cloned)
    if op is ops.fp8_linear_add:
        found, expected = named["residual"], cloned["residual"]
    assert found.is_contiguous()
    # With a norm, sums of squares in another order may move a number by one step of eight bits.
    tolerance = 2e-2 if "norm" in op.name else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", [ops.fp8_norm_gated_linear, ops.fp8_linear_add, ops.fp8_linear])
@pytest.mark.parametrize("block_n", [1, 128])
def test_many_rows_go_to_the_blas(triton, monkeypatch, randn, op, block_n) -> None:
    """What it is given is what the reference would quantise, in rows that may be more than asked
    for; what it returns of those is left out."""
    if randn(1).device.type != "cpu":
        pytest.skip("a device's own is compared by the kit")
    function = triton(op)
    from reprise.ops.fp8_linear import quantise_kernel
    from reprise.ops.fp8_linear.reference import dequantise

    calls = []

    def multiply(numbers, scales, weight, scale, bias, rows_of_scale, dtype):
        calls.append(len(numbers))
        # Behind the rows there may be anything.
        numbers[70:] = torch.nan
        scales[70:] = torch.nan
        wide = dequantise(numbers, scales, 1, numbers.shape[1] // scales.shape[1])
        product = wide @ dequantise(weight, scale, rows_of_scale, block_k).t()
        return (product if bias is None else product + bias).to(dtype)

    module = sys.modules[function.__module__]
    platform = SimpleNamespace(multiplies_fp8=True)
    monkeypatch.setattr(module, "active_platform", lambda: platform)
    monkeypatch.setattr(module.scaled_mm, "takes", lambda *shapes: True)
    monkeypatch.setattr(module.scaled_mm, "requires", lambda platform: None)
    monkeypatch.setattr(module.scaled_mm, "multiply", multiply)
    # Conversion to eight bits is the device's own there, and wrong in the interpreter.
    kernel = quantise_kernel.quantise

    def quantise(x, group, native, *args):
        numbers, scales = kernel(x, group, False, *args)
        return numbers.to(torch.float8_e4m3fn), scales

    monkeypatch.setattr(module, "quantise", quantise)
    block_k = 512 if block_n == 1 else 128
    named = {
        "x": randn(70, 512),
        "weight": randn(96, 512).to(torch.float8_e4m3fn),
        "scale": (randn(-(-96 // block_n), 512 // block_k).abs() + 0.1) / 512**0.5,
        "bias": randn(96),
        "block_n": block_n,
        "block_k": block_k,
    }
    if "norm" in op.name:
        named |= {"norm_weight": randn(512), "eps": 1e-6}
    if op is ops.fp8_linear_add:
        named["residual"] = randn(70, 96)
    cloned = {k: v.clone() if k == "residual" else v for k, v in named.items()}
    found, expected = function(**named), op.implementations["reference"].function(**cloned)
    if op is ops.fp8_linear_add:
        found, expected = named["residual"], cloned["residual"]
    assert calls == [72]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_what_it_refuses(randn) -> None:
    from reprise.ops.fp8_linear.accepts import accepts

    assert accepts(randn(1, 200), block_k=128) is not None
    assert accepts(randn(1, 256), block_k=64) is not None
    assert accepts(randn(1, 256), block_k=128) is None
    assert accepts(randn(1, 256), block_k=256) is None
    assert accepts(randn(1, 512)[:, ::2], block_k=128) is not None


@pytest.mark.parametrize("rows", [1, 5])
def test_a_share_of_one_step(triton, randn, rows) -> None:
    """The sizes of weights with few tiles, whose programs each have a single step."""
    triton(ops.fp8_linear)
    from reprise.ops.fp8_linear.product_kernel import _FEW_TILES, fitted, launch_product
    from reprise.ops.fp8_linear.quantise_kernel import quantise

    outputs, inputs = 130, 1024
    x = randn(rows, inputs, dtype=torch.float16)
    weight = randn(outputs, inputs).to(torch.float8_e4m3fn)
    scale = (randn(-(-outputs // 128), inputs // 128).abs() + 0.1) / inputs**0.5
    residual = randn(rows, outputs, dtype=torch.float16)
    expected = residual.clone()
    ops.fp8_linear_add.implementations["reference"].function(
        x, expected, weight, scale, None, 128, 128
    )
    config = fitted(_FEW_TILES, outputs, inputs, x.device, wide=True)
    assert config.splits * config.together * 128 == inputs
    numbers, scales = quantise(x, 128, False)
    launch_product(numbers, scales, weight, scale, None, residual, 128, add=True, config=config)
    torch.testing.assert_close(residual, expected, rtol=4e-3, atol=4e-3)


def test_few_tiles_are_of_one_row() -> None:
    """Several rows have the sizes that a device has compared."""
    kernel = pytest.importorskip("reprise.ops.fp8_linear.product_kernel")
    one, two, eight = (
        kernel._config_of(rows, 4096, 4096, torch.device("cpu"), False) for rows in (1, 2, 8)
    )
    assert one.rows == kernel._FEW_TILES.rows
    assert two == eight
    assert two.rows == kernel._CONFIGS[0].rows


@pytest.mark.parametrize(("shared_memory", "together"), [(232448, 2), (101376, 1)])
def test_two_steps_at_a_time_where_two_programs_have_room(
    triton, monkeypatch, shared_memory, together
) -> None:
    triton(ops.fp8_linear)
    from reprise.ops.fp8_linear import product_kernel
    from reprise.ops.triton_util import DeviceLimits

    monkeypatch.setattr(product_kernel, "limits", lambda _: DeviceLimits(132, shared_memory))
    sizes = product_kernel._config_of.__wrapped__
    assert sizes(64, 4096, 4096, torch.device("cpu"), False).together == together
    assert sizes(64, 4096, 4096, torch.device("cpu"), True).together == 1


@pytest.mark.parametrize(
    ("together", "programs", "gated"), [(1, 4, False), (2, 0, True), (4, 4, True), (8, 0, False)]
)
def test_a_row_that_its_programs_quantise(triton, randn, together, programs, gated) -> None:
    """Groups of a step are a column each, whatever their number; groups differ by powers of two, so
    that one in another's place is seen."""
    triton(ops.fp8_linear)
    from reprise.ops.fp8_linear.row_kernel import Config, fitted, launch_row

    outputs, inputs = 96, 2048
    x = randn(1, inputs, dtype=torch.float16)
    x *= 2.0 ** torch.arange(inputs // 128, device=x.device).sub(8).repeat_interleave(128)
    weight = randn(outputs, inputs).to(torch.float8_e4m3fn)
    scale = (randn(-(-outputs // 32), inputs // 128).abs() + 0.1) / inputs**0.5
    gain = randn(inputs, dtype=torch.float16)
    op = ops.fp8_norm_gated_linear if gated else ops.fp8_norm_linear
    expected = op.implementations["reference"].function(x, gain, 1e-6, weight, scale, None, 32, 128)
    config = fitted(Config(64, together, 2, 4, programs), outputs, inputs, x.device)
    assert (config.splits > 1) == (programs > 0)
    out = torch.full_like(expected, torch.nan)
    launch_row(x, weight, scale, None, out, 32, False, gain, 1e-6, gated=gated, config=config)
    most = float(expected.abs().max())
    torch.testing.assert_close(out / most, expected / most, rtol=2e-2, atol=4e-3)
