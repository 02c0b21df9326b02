"""Implementations that promise bits which depend on a row alone, and engines that ask for them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers import TinyModels, make_llm
from torch import Tensor

from reprise import ops
from reprise.doctor.conformance.contract import MODELS
from reprise.errors import ConfigError, ModelError, OpError
from reprise.ops import OpTable, lanes
from reprise.ops.linear import invariant
from reprise.platforms import Platform
from reprise.platforms.cpu import CpuPlatform


def random_rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (37, 33), (513, 576), (48, 1100)])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Of any size, at any place, from any address."""
    weight = random_rows(outputs, inputs, dtype)
    rows = random_rows(200, inputs, dtype)
    alone = torch.cat([invariant.linear(each, weight, None) for each in rows.split(1)])
    chance = random.Random(outputs)
    for size in (2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 130, 200):
        begin = chance.randrange(201 - size)
        together = invariant.linear(rows[begin : begin + size], weight, None)
        assert torch.equal(together, alone[begin : begin + size])
        picked = torch.tensor([chance.randrange(200) for _ in range(size)])
        assert torch.equal(invariant.linear(rows[picked], weight, None), alone[picked])
    exact = rows.double() @ weight.double().t()
    torch.testing.assert_close(alone.double(), exact, rtol=2e-2, atol=0.5)


def test_tiles_hold_all_rows_and_little_more() -> None:
    for sizes in ((16,), (2, 4, 8, 16, 64), (1, 16), (16, 64)):
        for rows in range(200):
            found = list(invariant.tiles(rows, sizes))
            assert set(found) <= set(sizes)
            assert sum(found) >= rows > sum(found[:-1]) if rows else not found
            assert sum(found) < rows + max(sizes[0], rows)


def test_a_size_of_tiles_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a BLAS that has a kernel of its own for few rows, and one for many."""

    def product(tile: Tensor, weight: Tensor) -> Tensor:
        result = tile @ weight.t()
        return result * (1 + 2**-20) if len(tile) in (1, 64) else result

    def by_place(tile: Tensor, weight: Tensor) -> Tensor:
        return tile @ weight.t() + torch.arange(len(tile)).unsqueeze(1)

    weight = random_rows(8, 24)
    monkeypatch.setattr(invariant, "_multiply", product)
    sizes = invariant._seen(weight)
    assert 16 in sizes
    assert not {1, 64} & set(sizes)
    monkeypatch.setattr(invariant, "_multiply", by_place)
    with pytest.raises(OpError, match=r"\[8, 24\] float32 give equal rows different bits"):
        invariant._seen(weight)


@pytest.mark.parametrize("name", ["sigmoid", "silu", "softplus"])
def test_a_function_of_a_number_has_the_same_bits_at_any_place(name: str) -> None:
    function = getattr(lanes, name)
    x = torch.cat((random_rows(1, 3000)[0] * 8, torch.tensor([0.0, 90.0, -90.0, 1e30, -1e30])))
    whole = function(x)
    assert torch.equal(whole, torch.cat([function(each) for each in x.split(1)]))
    assert torch.equal(whole, torch.cat([function(each) for each in x.split(37)]))
    torch.testing.assert_close(whole, getattr(torch.nn.functional, name)(x), rtol=1e-6, atol=1e-30)


class Two:
    """A platform's choice among implementations that differ in what they promise."""

    def __init__(self, name: str, **second: Any) -> None:
        cases = ops.linear.cases
        self.op = ops.op(name, _negative, cases=cases, fake=_like)
        self.op.implementation("onednn", lambda x: x - 1)
        self.op.implementation("vendor", lambda x: x - 2, **second)

    def __enter__(self) -> ops.Op:
        return self.op

    def __exit__(self, *error: object) -> None:
        del ops.registry.declared[self.op.name]


def _negative(x: Tensor) -> Tensor:
    return -x


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_only_implementations_that_promise_it_are_chosen() -> None:
    with Two("promises", batch_invariant=True) as op:
        assert OpTable(CpuPlatform()).chosen[op.name].name == "onednn"
        table = OpTable(CpuPlatform(), batch_invariant=True)
        assert table.chosen[op.name].name == "vendor"
        with table.activate():
            assert op(torch.ones(1)).item() == -1
        with pytest.raises(OpError, match=r"--op promises=onednn: .*other rows.*promises=vendor"):
            OpTable(CpuPlatform(), {op.name: "onednn"}, batch_invariant=True)
        asked = OpTable(CpuPlatform(), {op.name: "vendor"}, batch_invariant=True)
        assert asked.chosen[op.name].name == "vendor"


def test_what_no_device_has_run_is_named_and_not_chosen() -> None:
    with Two("untried", batch_invariant=True, on_request="no device has run it yet") as op:
        table = OpTable(CpuPlatform(), batch_invariant=True)
        assert op.name not in table.chosen
        with table.activate(), pytest.raises(OpError, match="untried=vendor, no device has run it"):
            op(torch.ones(1))


def test_a_promise_may_hold_on_some_platforms() -> None:
    class Elsewhere(CpuPlatform):
        name = "elsewhere"

    def here(platform: Platform) -> bool:
        return platform.name == "cpu"

    with Two("depends_on_it", batch_invariant=here) as op:
        assert op.name in OpTable(CpuPlatform(), batch_invariant=True).chosen
        table = OpTable(Elsewhere(), batch_invariant=True)
        assert op.name not in table.chosen
        with pytest.raises(OpError, match="implementation of depends_on_it on elsewhere"):
            table.implementation_of(op, (torch.ones(1),), {})


def test_no_other_one_computes_what_the_promising_ones_refuse() -> None:
    def short(x: Tensor) -> str | None:
        return "rows are too long" if x.shape[1] > 4 else None

    with Two("promises_some", batch_invariant=True, accepts=short) as op:
        table = OpTable(CpuPlatform(), batch_invariant=True)
        with table.activate():
            assert op(torch.ones(1, 3)).tolist() == [[-1.0] * 3]
            with pytest.raises(OpError, match=r"promises_some \(vendor: rows are too long"):
                op(torch.ones(1, 9))


def test_a_model_is_refused_by_the_op_that_it_lacks(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first step, also where only a draft or a draw would have called it."""
    for op in (ops.paged_attention, ops.sample):
        for each in op.implementations.values():
            monkeypatch.setattr(each, "batch_invariant", False)
    with pytest.raises(ModelError, match="on cpu: paged_attention, sample; leave the option out"):
        make_llm(tiny("qwen3"), "cpu", batch_invariant=True)


@pytest.mark.long
def test_a_model_that_needs_other_ops_is_refused_by_their_names() -> None:
    with pytest.raises(ModelError, match=r"have no batch-invariant .* on cpu: .*, indexer, sparse"):
        make_llm(MODELS / "compressed", "cpu", load_format="dummy", batch_invariant=True)


def test_the_log_says_what_computes(
    tiny: TinyModels, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="reprise"):
        llm = make_llm(tiny("qwen3"), device, batch_invariant=True)
    (line,) = [each.message for each in caplog.records if "bits of a row" in each.message]
    for op in ("norm_linear", "paged_attention", "sample"):
        name = llm.engine.runner.ops.chosen[op].name
        (computes,) = [each for each in line.split("; ") if f"{name} computes" in each]
        assert op in computes


def test_values_are_checked() -> None:
    from reprise.config import EngineConfig

    with pytest.raises(ConfigError, match="batch_invariant='yes' must be True or False"):
        EngineConfig(batch_invariant="yes")  # type: ignore[arg-type]
