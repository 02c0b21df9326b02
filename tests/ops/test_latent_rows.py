"""Rows of codes with powers of two for scales, against the formula and against exact numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reprise.ops.latent_rows import as_codes, group_size, load, quantise, store
from reprise.platforms import Platform


@pytest.fixture
def fp8(platform: Platform) -> torch.dtype:
    if platform.fp8_dtype is None:
        pytest.skip("the device has no eight-bit floating-point numbers")
    return platform.fp8_dtype


def power(most: float, largest: float) -> float:
    """The least power of two that brings ``most`` to at most ``largest``, by exact fractions."""
    found = 2.0**-40
    while found * largest < max(most, 1e-4):
        found *= 2
    return found


def test_scales_are_the_least_powers_of_two(platform: Platform, fp8: torch.dtype) -> None:
    """Also where the largest number is a power of two times the largest code, and beside it."""
    largest = torch.finfo(fp8).max
    most = [0.0, 1e-5, 1e-4, 1.0, 3.7, 1e4]
    for exponent in (-9, 0, 5):
        exact = largest * 2.0**exponent
        most += [exact, math.nextafter(exact, 0) * (1 - 1e-6), exact * (1 + 1e-6)]
    x = torch.zeros(len(most), 8)
    x[:, 3] = torch.tensor(most)
    x[:, 5] = -x[:, 3] / 3
    codes, scales = quantise(x.to(platform.device), fp8)
    assert scales.tolist() == [power(float(each), largest) for each in x[:, 3]]
    back = codes.float().cpu() * scales.cpu().unsqueeze(-1)
    # Half a step of three bits; below the least normal code half of its step.
    step = torch.maximum(x.abs() * 2**-4, scales.cpu().unsqueeze(-1) * 2**-10)
    assert bool(((back - x).abs() <= step).all())


def test_what_is_no_number_stays_none(platform: Platform, fp8: torch.dtype) -> None:
    for odd in (math.nan, math.inf, -math.inf):
        x = torch.ones(2, 8, device=platform.device)
        x[1, 2] = odd
        codes, scales = quantise(x, fp8)
        back = codes.float() * scales.unsqueeze(-1)
        assert bool(back[0].eq(1.0).all())
        assert bool(back[1].isnan().all())


@pytest.mark.parametrize("rotated", [0, 8])
def test_rows_come_back(platform: Platform, fp8: torch.dtype, rotated: int) -> None:
    """Those that are written, at their places; the rest is what it was, to the bit."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 4, 32, generator=generator).to(platform.device)
    cache, tail, scales = as_codes(rows, rotated, fp8)
    before = [each.clone() for each in (cache, tail, scales) if each is not None]
    new = torch.randn(3, 32, generator=generator).to(platform.device)
    block, offset = (torch.tensor(each, device=platform.device) for each in ([2, 0, 1], [3, 0, 2]))
    real = torch.tensor([True, False, True], device=platform.device)
    store(new, block, offset, cache, tail, scales, real)
    found = load(block * 4 + offset, cache, tail, scales)
    assert within_a_step(found[[0, 2]], new[[0, 2]], rotated)
    others = load(torch.arange(12, device=platform.device), cache, tail, scales)
    kept = [place for place in range(12) if place not in (11, 6)]
    assert within_a_step(others[kept], rows.flatten(0, 1)[kept], rotated)
    for was, each in zip(before, [x for x in (cache, tail, scales) if x is not None], strict=True):
        assert torch.equal(was[0].view(torch.uint8), each[0].view(torch.uint8))


def within_a_step(found: Tensor, expected: Tensor, rotated: int) -> bool:
    size = expected.shape[1] - rotated
    each = group_size(size) if rotated else size
    most = expected[:, :size].unflatten(1, (-1, each)).abs().amax(-1).repeat_interleave(each, 1)
    near = (found - expected)[:, :size].abs() <= most * 2**-4
    return bool(near.all()) and torch.equal(found[:, size:], expected[:, size:])
