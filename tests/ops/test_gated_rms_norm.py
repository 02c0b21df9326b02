from __future__ import annotations

import pytest
import torch

from reprise.ops import gated_rms_norm

EPS = 1e-6
reference = gated_rms_norm.implementations["reference"].function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_rounds_like_the_published_models(randn, dtype) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    x, gate, weight = randn(5, 3, 16, dtype=dtype), randn(5, 48, dtype=dtype), randn(16)
    oracle = Qwen3NextRMSNormGated(16, eps=EPS).to(x.device)
    oracle.weight.data.copy_(weight)
    expected = oracle(x, gate.view(5, 3, 16)).flatten(1)
    torch.testing.assert_close(reference(x, gate, weight, EPS), expected)


@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 3, 24), (7, 2, 128)])
def test_triton_reads_a_part_of_a_wider_product(implementation, dtypes, randn, shape) -> None:
    tokens, heads, size = shape
    for dtype in dtypes:
        x, weight = randn(*shape, dtype=dtype), randn(size)
        gate = randn(tokens, 3 * heads * size, dtype=dtype)[:, heads * size : 2 * heads * size]
        found = implementation(gated_rms_norm, "triton")(x, gate, weight, EPS)
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(
            found, reference(x, gate, weight, EPS), rtol=max(2 * step, 2e-6), atol=1e-6
        )
