"""Routing against transformers' routers and DeepSeek's formulas; ties, padding, odd rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reprise import ops

EXPERTS, TOP, ROWS = 24, 4, 6


@pytest.fixture(params=["reference", "triton"])
def compute(
    request: pytest.FixtureRequest, implementation: Callable[..., Callable[..., Any]]
) -> Callable[..., Any]:
    return implementation(ops.route, request.param)


def route(
    compute: Callable[..., Any], logits: Tensor, top: int, scoring: str = "softmax", *,
    live: int | None = None, renormalize: bool = True, scale: float = 1.0,
    bias: Tensor | None = None, chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = len(logits)
    weights = torch.full((rows, top), torch.nan, device=logits.device)
    ids = torch.full((rows, top), 99, dtype=torch.int32, device=logits.device)
    count = torch.tensor([rows if live is None else live], dtype=torch.int32, device=logits.device)
    compute(logits, count, weights, ids, scoring, renormalize, scale, bias, chosen)
    return weights, ids


def by_hand(scores: Tensor, keys: Tensor, top: int) -> tuple[list[list[float]], list[list[int]]]:
    """Weights that are not renormalised yet, and numbers, in plain Python."""
    ids = [
        sorted(range(len(row)), key=lambda each: (-row[each], each))[:top] for row in keys.tolist()
    ]
    return [[row[e] for e in each] for row, each in zip(scores.tolist(), ids, strict=True)], ids


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_is_that_of_transformers(
    compute: Callable[..., Any], device: str, renormalize: bool
) -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    generator = torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, num_experts=EXPERTS, num_experts_per_tok=TOP, norm_topk_prob=renormalize
    )
    router = Qwen3MoeTopKRouter(config)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        logits, expected, numbers = router(torch.randn(ROWS, 32, generator=generator))
    weights, ids = route(compute, logits.to(device), TOP, renormalize=renormalize)
    assert torch.equal(ids.cpu().long(), numbers)
    assert torch.allclose(weights.cpu(), expected, atol=1e-6)


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_a_bias_decides_about_the_choice_alone(
    compute: Callable[..., Any], device: str, scoring: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(ROWS, EXPERTS, generator=generator)
    logits[0] = -200.0  # log(1 + exp(x)) is 0 there, and the weights 0 / 0
    logits[1] = 200.0
    bias = torch.randn(EXPERTS, generator=generator)
    wide = logits.double()
    scores = wide.sigmoid()
    if scoring == "sqrtsoftplus":
        scores = (torch.log1p(torch.exp(-wide.abs())) + wide.clamp(min=0)).sqrt()
    found, numbers = by_hand(scores, scores.float() + bias, TOP)
    weights, ids = route(compute, logits.to(device), TOP, scoring, scale=1.5, bias=bias.to(device))
    assert ids[1:].tolist() == numbers[1:]
    chosen = torch.tensor(found)
    expected = 1.5 * chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20)
    assert torch.allclose(weights.cpu()[1:].double(), expected[1:].double(), atol=1e-6)
    assert bool(weights.isfinite().all())


def test_a_table_of_tokens_may_choose(compute: Callable[..., Any], device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(ROWS, EXPERTS, generator=generator)
    table = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(7)])
    chosen = table[torch.randint(7, (ROWS,), generator=generator)]
    weights, ids = route(compute, logits.to(device), TOP, "sqrtsoftplus", chosen=chosen.to(device))
    assert torch.equal(ids.cpu().long(), chosen)
    scores = torch.log1p(logits.exp()).sqrt().gather(1, chosen)
    expected = scores / scores.sum(dim=1, keepdim=True)
    assert torch.allclose(weights.cpu(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_the_lowest_number_is_chosen(
    compute: Callable[..., Any], device: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(4, (ROWS, EXPERTS), generator=generator).to(dtype)
    logits[0] = 0.0
    logits[1] = -torch.inf
    _, ids = route(compute, logits.to(device), TOP)
    assert ids.tolist() == by_hand(logits.float(), logits.float(), TOP)[1]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_whatever_a_row_holds_its_experts_exist_and_differ(
    compute: Callable[..., Any], device: str, odd: float
) -> None:
    """What indexes memory with them must not leave it."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(ROWS, EXPERTS, generator=generator)
    clean, _ = route(compute, logits[1:].to(device), TOP)
    logits[0, 1::2] = odd
    weights, ids = route(compute, logits.to(device), TOP)
    assert 0 <= int(ids.min()) <= int(ids.max()) < EXPERTS
    assert len(set(ids[0].tolist())) == TOP
    assert torch.equal(weights[1:], clean)
    logits[0] = odd
    _, ids = route(compute, logits.to(device), TOP)
    assert ids[0].tolist() == list(range(TOP))


@pytest.mark.parametrize("live", [0, 1, 7])
def test_padding_goes_to_no_expert(compute: Callable[..., Any], device: str, live: int) -> None:
    logits: Any = torch.randn(8, EXPERTS, generator=torch.Generator().manual_seed(5)).to(device)
    weights, ids = route(compute, logits, TOP)
    logits[live:] = torch.nan
    some, numbers = route(compute, logits, TOP, live=live)
    assert torch.equal(some[:live], weights[:live])
    assert torch.equal(numbers[:live], ids[:live])
    assert not some[live:].count_nonzero()
    assert bool((numbers[live:] == -1).all())
