"""Values that are not finite are found among bits of all kinds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reprise.finite import all_finite, first_odd

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def finite(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor if tensor.element_size() == 8 else tensor.float()
    return wide.isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_of_bits(dtype: torch.dtype) -> None:
    """Of one and two bytes all, of longer ones the patterns around both infinities."""
    size = dtype.itemsize
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    if size <= 2:
        bits = torch.arange(256**size).to(integers)
    else:
        infinity = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(integers)
        near = (infinity[:, None] + torch.arange(-3, 4)).flatten()
        bits = torch.cat((near, torch.tensor([0, 1, -1, torch.iinfo(integers).min]).to(integers)))
    values = bits.view(dtype)
    assert [all_finite(each) for each in values] == finite(values).tolist()


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 7), max_size=3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
    odd=st.booleans(),
)
def test_the_first_place(
    dtype: torch.dtype, shape: list[int], transposed: bool, seed: int, odd: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.rand(shape, generator=generator).to(dtype)
    if odd and tensor.numel():
        place = int(torch.randint(tensor.numel(), (), generator=generator))
        flat = tensor.view(-1).view(torch.uint8).view(-1, dtype.itemsize)
        flat[place] = torch.tensor([torch.nan]).to(dtype).view(torch.uint8)
    if transposed:
        tensor = tensor.mT if tensor.dim() > 1 else tensor
    wrong = (~finite(tensor)).nonzero().tolist()
    assert first_odd(tensor) == (tuple(wrong[0]) if wrong else None)
    assert all_finite(tensor) is not bool(wrong)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 131071, 131072, 300_000])
def test_beyond_what_is_looked_at_together(value: float, place: int) -> None:
    tensor = torch.zeros(300_001, dtype=torch.bfloat16)
    tensor[place] = value
    assert first_odd(tensor) == (place,)


def test_integers_are_finite() -> None:
    assert all_finite(torch.tensor([-1, 2**31 - 1], dtype=torch.int32))
    assert all_finite(torch.tensor([True]))
