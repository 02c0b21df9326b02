from __future__ import annotations

import pytest
import torch

from reprise.ops import argmax


@pytest.mark.parametrize("name", list(argmax.implementations))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4096), (5, 9001), (0, 8)])
def test_the_largest(implementation, dtypes, randn, shape, name) -> None:
    function = implementation(argmax, name)
    for dtype in dtypes:
        logits = randn(*shape, dtype=dtype)
        found = function(logits)
        assert found.dtype == torch.int64
        expected = [max(range(shape[1]), key=row.__getitem__) for row in logits.tolist()]
        assert found.tolist() == expected


@pytest.mark.parametrize("name", list(argmax.implementations))
def test_signs_infinities_and_ties(implementation, platform, name) -> None:
    function = implementation(argmax, name)
    inf = float("inf")
    rows = [[-3.0, -1.0, -2.0], [-inf, -1e30, -inf], [0.0, 2.0, 2.0], [-inf, -inf, -inf],
            [1.0, inf, 2.0], [-1.0, -0.0, 0.0]]  # fmt: skip
    found = function(torch.tensor(rows, device=platform.device))
    assert found.tolist() == [1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("name", list(argmax.implementations))
def test_what_is_no_number_gives_a_token(implementation, platform, name) -> None:
    nan = float("nan")
    rows = torch.tensor([[nan] * 5, [nan, 1.0, 2.0, nan, 0.0], [-nan] * 5], device=platform.device)
    found = implementation(argmax, name)(rows)
    assert int(found.min()) >= 0
    assert int(found.max()) < 5


@pytest.mark.parametrize("name", list(argmax.implementations))
def test_strided_rows(implementation, randn, name) -> None:
    function = implementation(argmax, name)
    wide = randn(4, 6000)
    assert torch.equal(function(wide[:, :5000]), wide[:, :5000].argmax(-1))
    tall = wide[:, :300].t()
    assert torch.equal(function(tall), tall.argmax(-1))
