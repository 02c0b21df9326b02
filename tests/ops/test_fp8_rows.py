from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.ops.fp8_rows import LEAST_SCALE, dequantise, quantise

E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


@pytest.mark.parametrize("dtype", [E4M3, FNUZ])
@given(exponent=st.integers(-30, 30), spread=st.integers(0, 8), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_an_element_is_off_by_half_a_code_step_at_most(
    dtype: torch.dtype, exponent: int, spread: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 3, 16, generator=generator) * 2.0**exponent
    x *= 2.0 ** torch.randint(-spread, spread + 1, x.shape, generator=generator)
    codes, scales = quantise(x, dtype)
    assert (codes.dtype, scales.dtype, scales.shape) == (dtype, torch.float32, x.shape[:-1])
    of = torch.finfo(dtype)
    # The least code step is that of the smallest normal number.
    step = torch.maximum(x.abs() * 2**-3, scales.unsqueeze(-1) * of.smallest_normal * 2**-3)
    assert ((dequantise(codes, scales) - x).abs() <= step / 2 * (1 + 1e-6)).all()
    # The largest element of a row uses the largest code.
    assert (codes.float().abs().amax(dim=-1) == of.max).all()


def test_a_row_depends_on_itself_alone() -> None:
    x = torch.randn(5, 2, 8)
    codes, scales = quantise(x, E4M3)
    for row in range(5):
        alone = quantise(x[row], E4M3)
        assert torch.equal(codes[row].view(torch.uint8), alone[0].view(torch.uint8))
        assert torch.equal(scales[row], alone[1])


def test_zeros_and_what_is_no_number() -> None:
    x = torch.zeros(3, 4)
    x[1, 2], x[2, 0] = torch.inf, torch.nan
    codes, scales = quantise(x, E4M3)
    assert scales[0] == LEAST_SCALE
    back = dequantise(codes, scales)
    assert not back[0].any()
    assert back[1:].isnan().any(dim=-1).all()


def test_a_fixed_scale_is_used_as_it_is_and_saturates() -> None:
    x = torch.tensor([[0.5, -1.0, 448.0, 1e6], [2.0, 3.0, 4.0, 8.0]])
    codes, scales = quantise(x, E4M3, torch.tensor(0.5))
    assert scales.tolist() == [0.5, 0.5]
    assert codes.float().tolist() == [[1.0, -2.0, 448.0, 448.0], [4.0, 6.0, 8.0, 16.0]]
    # Zero is none; a scale is of a largest code of 448 whichever the cache has.
    assert torch.equal(quantise(x, E4M3, torch.tensor(0.0))[1], quantise(x, E4M3)[1])
    assert quantise(x, FNUZ, torch.tensor(0.5))[1].tolist() == pytest.approx([0.5 * 448 / 240] * 2)
