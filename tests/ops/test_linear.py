from __future__ import annotations

import pytest
import torch

from reprise.ops import linear


@pytest.mark.parametrize("name", list(linear.implementations))
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_product_and_bias(implementation, randn, rows, name) -> None:
    function = implementation(linear, name)
    x, weight, bias = randn(rows, 96), randn(7, 96), randn(7)
    product = (x.double().unsqueeze(1) * weight.double()).sum(-1)
    for each in (None, bias):
        found = function(x, weight, each)
        assert found.is_contiguous()
        expected = product if each is None else product + each.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
