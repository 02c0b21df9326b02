"""Rotation, quantisation and products of groups in two kernels, against the reference."""

from __future__ import annotations

import sys

import pytest
import torch

from reprise import ops
from reprise.ops.cases import Maker
from reprise.ops.fp8_linear.reference import dequantise
from reprise.ops.fp8_linear.reference import quantise as quantised_as_reference

OP = ops.fp8_rotated_output


@pytest.fixture
def computed(implementation):
    return OP.implementations["triton"], implementation(OP, "triton")


def taken(platform, declared, dtype: torch.dtype):
    every = OP.cases.small(Maker(platform.device, dtype))
    found = [each for each in every if declared.refusal(**each) is None]
    assert 0 < len(found) < len(every)
    return found


def test_small_cases(computed, platform, dtypes, pytestconfig) -> None:
    declared, function = computed
    long = platform.device_type != "cpu" or pytestconfig.getoption("--long")
    for dtype in dtypes if long else dtypes[:1]:
        for each in taken(platform, declared, dtype):
            # A number that is half-way between two of eight bits may become either one.
            allowed = 1e-4 if dtype is torch.float32 else 3e-2
            expected = OP.implementations["reference"].function(**each)
            torch.testing.assert_close(function(**each), expected, rtol=allowed, atol=allowed)


def test_heads_that_are_strided(computed, platform) -> None:
    declared, function = computed
    first, *_ = taken(platform, declared, torch.float32)
    x = first["x"]
    wide = x.new_full((2 * len(x), x.shape[1], x.shape[2] + 8), torch.nan)
    wide[::2, :, 8:] = x
    found = function(**{**first, "x": wide[::2, :, 8:]})
    torch.testing.assert_close(found, function(**first))


@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 3, 128), (4, 2, 384)])
def test_the_same_eight_bits_as_the_reference(
    implementation, platform, heads, groups, size
) -> None:
    """Where nothing rotates, so that no sum is rounded otherwise; from numbers that round to zero
    up to the largest, and tokens that are zero."""
    implementation(OP, "triton")
    from reprise.ops.fp8_rotated_output.triton import quantised

    make = Maker(platform.device, torch.float32)
    x = make.randn(5, heads, size) * torch.logspace(-9, 3, 5, device=platform.device)[:, None, None]
    x[1] = (x[1] * 64).round() / 64
    x[2] = 0
    still = torch.cat((x.new_ones(1, 16), x.new_zeros(1, 16)), dim=1)
    positions = make.ints([0] * 5)
    numbers, scales = quantised(x, positions, still, groups, 128, False)
    for each, rows in enumerate(x.view(5, groups, -1).unbind(1)):
        expected, expected_scales = quantised_as_reference(rows, 128)
        assert torch.equal(numbers[each], expected.float())
        assert torch.equal(scales[each].t(), expected_scales)


def test_many_rows_go_to_the_blas(implementation, platform, monkeypatch) -> None:
    """Group by group, of what the kernel has quantised; behind the rows there may be anything."""
    if platform.device_type != "cpu":
        pytest.skip("a device's own is compared by the kit")
    function = implementation(OP, "triton")
    module = sys.modules[function.__module__]
    seen = []

    def multiply(numbers, scales, weight, scale, bias, block_n, dtype):
        seen.append(numbers.shape)
        numbers[5:], scales[5:] = torch.nan, torch.nan
        wide = dequantise(numbers, scales, 1, 128)
        return (wide @ dequantise(weight, scale, block_n, 128).t()).to(dtype)

    def quantised(x, positions, cos_sin, groups, group, native, room):
        numbers, scales = kernel(x, positions, cos_sin, groups, group, False, room)
        return numbers.to(torch.float8_e4m3fn), scales

    kernel = module.quantised
    monkeypatch.setattr(module, "for_blas", lambda *one: True)
    monkeypatch.setattr(module, "multiply", multiply)
    # Conversion to eight bits is the device's own there, and wrong in the interpreter.
    monkeypatch.setattr(module, "quantised", quantised)
    arguments = OP.cases.small(Maker(platform.device, torch.float32))[1]
    expected = OP.implementations["reference"].function(**arguments)
    torch.testing.assert_close(function(**arguments), expected, rtol=1e-4, atol=1e-4)
    assert seen == [(8, 256)] * 3
