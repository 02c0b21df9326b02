"""Kernels in C++: what the cases of their ops do not show."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reprise.errors import OpError
from reprise.ops import (
    cpp,
    gated_linear,
    linear,
    linear_add,
    norm_gated_linear,
    norm_linear,
    paged_attention,
    rotary_cache,
)
from reprise.ops.linear import onednn
from reprise.ops.linear.cpp import MOST_ROWS
from reprise.ops.paged_attention import sdpa
from reprise.ops.registry import Op, OpTable
from reprise.ops.rotary_cache import host
from reprise.platforms.cpu import CpuPlatform

KINDS = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def compiled(platform) -> None:
    reason = cpp.needs_compiler(platform)
    if reason is not None:
        pytest.skip(reason)


def test_a_cpu_gets_them() -> None:
    chosen = OpTable(CpuPlatform()).chosen
    for each in (
        linear, gated_linear, norm_linear, norm_gated_linear, linear_add, rotary_cache,
        paged_attention,
    ):  # fmt: skip
        assert chosen[each.name].name == "cpp"


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("inputs", [576, 83])
def test_bits_of_a_row_depend_on_it_alone(randn, dtype, inputs) -> None:
    """Whichever tile it is in, with however many threads."""
    x, gain = randn(16, inputs, dtype=dtype), randn(inputs, dtype=dtype)
    weight = (randn(514, inputs) / inputs**0.5).to(dtype)
    bias, residual = randn(514, dtype=dtype), randn(16, 514, dtype=dtype)

    def all_of(rows: slice) -> list[Tensor]:
        part, added = x[rows], residual[rows].clone()
        function(linear_add)(part, weight, bias, added)
        return [
            function(linear)(part, weight, bias),
            function(norm_linear)(part, gain, 1e-6, weight, None),
            function(norm_gated_linear)(part, gain, 1e-6, weight, bias),
            added,
        ]

    alone = [
        torch.cat(each) for each in zip(*(all_of(slice(i, i + 1)) for i in range(16)), strict=True)
    ]
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            for most in (2, 5, 8):
                parts = zip(*(all_of(slice(i, i + most)) for i in range(0, 16, most)), strict=True)
                for found, expected in zip(parts, alone, strict=True):
                    assert torch.equal(torch.cat(found), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", KINDS)
def test_small_steps_of_any_kind_are_theirs(randn, monkeypatch, dtype) -> None:
    """In place of torch's calls for each request, or for each part of a rotation."""

    def others(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch's")

    def of(tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
        blocks = tokens // 16 + 1
        cache = {
            name: randn(2 * blocks, 16, 2, 32, dtype=dtype) for name in ("key_cache", "value_cache")
        }
        attention = {
            **cache, "query": randn(tokens, 8, 32, dtype=dtype), "query_len": 0,
            "block_tables": torch.arange(2 * blocks, dtype=torch.int32).view(2, -1),
            "seq_lens": torch.tensor([tokens - 9, 9], dtype=torch.int32),
            "query_start_loc": torch.tensor([0, tokens - 9, tokens], dtype=torch.int32),
            "out": torch.empty(tokens, 8, 32, dtype=dtype), "scale": 0.2, "sliding_window": 0,
            "soft_cap": 0.0,
        }  # fmt: skip
        gain = randn(32, dtype=dtype)
        rotation = {
            **cache, "qkv": randn(tokens, 12 * 32, dtype=dtype), "positions": torch.arange(tokens),
            "cos_sin": randn(tokens, 32), "slot_mapping": torch.arange(tokens) + 16,
            "query_norm": gain, "key_norm": gain, "eps": 1e-6,
        }  # fmt: skip
        return attention, rotation

    def computed(name: str, op: Op, arguments: dict[str, Any], *written: str) -> list[Tensor]:
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        result = op.implementations[name].function(**copies)
        return [*(copies[each] for each in written), *([] if result is None else [result])]

    monkeypatch.setattr(sdpa, "paged_attention", others)
    monkeypatch.setattr(host, "rotary_cache", others)
    ops = ((paged_attention, ("out",)), (rotary_cache, ("key_cache", "value_cache")))
    for (op, written), arguments in zip(ops, of(60), strict=True):
        found = computed("cpp", op, arguments, *written)
        expected = computed("reference", op, arguments, *written)
        for each, right in zip(found, expected, strict=True):
            torch.testing.assert_close(each, right)
    for (op, _), arguments in zip(ops, of(1000), strict=True):
        with pytest.raises(AssertionError, match="torch's"):
            computed("cpp", op, arguments)


def test_as_many_rows_of_bfloat16_are_theirs_as_they_are_faster_for(randn, monkeypatch) -> None:
    def others(*args: Any) -> None:
        raise AssertionError("torch's")

    monkeypatch.setattr(onednn, "linear", others)
    rows, kind = MOST_ROWS[torch.bfloat16], torch.bfloat16
    assert rows == (8 if onednn.HAS_BFLOAT16 else 256)
    x, weight = randn(rows + 1, 96, dtype=kind), (randn(70, 96) / 10).to(kind)
    expected = linear.implementations["reference"].function(x, weight, None)[:rows]
    torch.testing.assert_close(function(linear)(x[:rows], weight, None), expected)
    with pytest.raises(AssertionError, match="torch's"):
        function(linear)(x, weight, None)


def function(op: Op):
    return op.implementations["cpp"].function


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("gain_dtype", KINDS)
def test_norms_round_as_the_reference(randn, dtype, gain_dtype) -> None:
    """The gain of the row's own dtype multiplies what was rounded to it."""
    x, gain = randn(3, 128, dtype=dtype), randn(128, dtype=gain_dtype)
    ones = torch.eye(128, dtype=dtype)  # the product is the norm
    found = function(norm_linear)(x, gain, 1e-6, ones, None)
    expected = norm_linear.implementations["reference"].function(x, gain, 1e-6, ones, None)
    assert found.dtype == dtype
    # A sum of float32 is as exact as the processor's vectors are wide.
    step = torch.finfo(dtype).eps * (1 if dtype is torch.bfloat16 else 4)
    torch.testing.assert_close(found, expected, rtol=step, atol=0)
    if dtype is torch.bfloat16:
        assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", KINDS)
def test_numbers_that_are_none_stay_so(dtype) -> None:
    """A request whose logits are NaN has to end with an error: nothing may hide one."""
    x = torch.ones(4, 40, dtype=dtype)
    x[1, 3], x[2, 39] = math.nan, math.inf
    weight = torch.ones(6, 40, dtype=dtype)
    found = function(linear)(x, weight, None)
    assert found[1].isnan().all()
    assert found[2].isposinf().all()
    assert found[[0, 3]].isfinite().all()
    gated = function(norm_gated_linear)(x, torch.ones(40, dtype=dtype), 1e-6, weight, None)
    assert gated[1].isnan().all()
    assert gated[[0, 3]].isfinite().all()


def test_silu_of_any_gate() -> None:
    gates = torch.tensor([-1e30, -200.0, -88.5, -87.5, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 1e30])
    weight = torch.cat([gates, torch.ones_like(gates)]).unsqueeze(1)
    found = function(norm_gated_linear)(torch.ones(1, 1), torch.ones(1), 0.0, weight, None)
    expected = torch.nn.functional.silu(gates.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-35)


def test_what_lies_outside_is_not_touched() -> None:
    """A graph that goes wrong may say anything; the process must live to say so."""
    cache = torch.zeros(3, 4, 1, 8)
    tables = torch.tensor([[1, 2]], dtype=torch.int32)
    one = torch.ones(1, 1, 8)

    def attend(length: int, tables: Tensor, begin: int = 0, end: int = 1) -> None:
        lengths = torch.tensor([length], dtype=torch.int32)
        starts = torch.tensor([begin, end], dtype=torch.int32)
        out = torch.empty_like(one)
        function(paged_attention)(one, cache, cache, tables, lengths, starts, out, 1.0, 0, 0.0, 1)

    attend(8, tables)
    with pytest.raises(IndexError, match="longer than its block table"):
        attend(9, tables)
    for block in (3, -1):
        with pytest.raises(IndexError, match="beyond the cache"):
            attend(5, torch.tensor([[1, block]], dtype=torch.int32))
    for begin, end in ((0, 1 << 30), (-1, 1), (1, 0)):
        with pytest.raises(IndexError, match="beyond the step's"):
            attend(5, tables, begin, end)

    def write(position: int, slot: int) -> None:
        places = torch.tensor([position]), torch.tensor([slot])
        function(rotary_cache)(
            torch.ones(1, 24), places[0], torch.ones(5, 8), places[1], cache, cache.clone(),
            None, None, 1e-6,
        )  # fmt: skip

    write(4, 11)
    for position, slot in ((5, 0), (-1, 0), (0, 12), (0, -1)):
        with pytest.raises(IndexError, match="beyond"):
            write(position, slot)


@pytest.mark.parametrize("dtype", KINDS)
def test_views_are_computed_where_they_lie(randn, dtype) -> None:
    """Rows of wider tensors, and a cache of keys beside values."""
    wide, weight = randn(3, 200, dtype=dtype), randn(20, 200, dtype=dtype)
    x, part = wide[:, 50:150], weight[:, 100:]
    expected = x.contiguous() @ part.contiguous().T
    torch.testing.assert_close(function(linear)(x, part, None), expected, rtol=2e-2, atol=2e-2)
    turned = function(linear)(x.T.contiguous().T, part.T.contiguous().T, None)
    torch.testing.assert_close(turned, expected, rtol=2e-2, atol=2e-2)


def test_what_does_not_fit_is_refused_as_torch_does() -> None:
    """Kernels see addresses alone: other dtypes and sizes would be read as what they are not."""
    x, weight = torch.ones(2, 64), torch.ones(8, 64)
    for wrong in (weight.bfloat16(), torch.ones(8, 32)):
        with pytest.raises(RuntimeError):
            function(linear)(x, wrong, None)
    wide = torch.zeros(2, 8, dtype=torch.float64)
    function(linear_add)(x, weight, None, wide)
    assert torch.equal(wide, torch.full_like(wide, 64))


def operands() -> list[Any]:
    """By op: its arguments, and those that are replaced by others, by place."""
    product = torch.ones(2, 64), torch.ones(64), 1e-6, torch.ones(8, 64), torch.ones(8)
    x, _, _, weight, bias = product
    cache = torch.zeros(3, 4, 1, 8)
    table, place = torch.ones(9, 8), torch.tensor([5])
    heads = torch.ones(8)
    rotate = torch.ones(1, 24), place, table, place, cache, cache.clone(), heads, heads, 1e-6
    number = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    starts, one = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, 1, 8)
    attend = one, cache, cache, *number, starts, torch.ones(1, 1, 8), 1.0, 0, 0.0, 1
    return [
        (linear, (x, weight, bias), (2,)),
        (norm_linear, product, (1, 4)),
        (norm_gated_linear, product, (1, 4)),
        (linear_add, (x, weight, bias, torch.ones(2, 8)), (2, 3)),
        (rotary_cache, rotate, (1, 2, 3, 5, 6, 7)),
        (paged_attention, attend, (2, 3, 4, 5, 6)),
    ]


OTHERS = {
    "of doubles": lambda each: each.double() if each.is_floating_point() else each.long().double(),
    "of halves": lambda each: each.half() if each.is_floating_point() else each.short(),
    "of other whole numbers": lambda each: each.long() if each.dtype is torch.int32 else each.int(),
    "cut": lambda each: each[..., :-1],
    "of fewer rows": lambda each: each[:-1],
    "with gaps": lambda each: each.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("number", range(6))
def test_no_operand_is_read_as_what_it_is_not(monkeypatch, number, other) -> None:
    """Whatever it is, its kernel is not told of its address: torch computes it, or says what is
    wrong with it."""
    op, arguments, places = operands()[number]
    calls: list[Any] = []
    real = cpp.Kernel.__call__
    monkeypatch.setattr(cpp.Kernel, "__call__", lambda *each: calls.append(each) or real(*each))
    function(op)(*arguments)
    assert len(calls) == 1  # of these it is
    for place in places:
        given = arguments[place]
        replaced = OTHERS[other](given)
        alike = replaced.dtype is given.dtype and replaced.is_contiguous()
        if alike and (replaced.shape == given.shape or given.shape == (9, 8)):
            continue  # the same, or a table of fewer positions
        if other == "cut" and given.shape == (1, 2):
            continue  # a request of fewer blocks
        others = (*arguments[:place], replaced, *arguments[place + 1 :])
        with contextlib.suppress(RuntimeError, IndexError, TypeError, ValueError):
            function(op)(*others)
        assert len(calls) == 1, place


def test_operands_that_fit_each_other_and_not_the_cache_are_torch_s(monkeypatch) -> None:
    """A query and its output of other heads than the cache has; rows that are no whole heads."""
    monkeypatch.setattr(cpp.Kernel, "__call__", lambda *each: pytest.fail("it was told of them"))
    attend = operands()[5][1]
    caches = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    for shape, (keys, values) in (
        ((1, 1, 4), attend[1:3]), ((1, 1, 16), attend[1:3]), ((1, 3, 8), caches)
    ):  # fmt: skip
        query, out = torch.ones(shape), torch.ones(shape)
        with contextlib.suppress(RuntimeError):
            function(paged_attention)(query, keys, values, *attend[3:6], out, *attend[7:])
    rotate = operands()[4][1]
    with pytest.raises(RuntimeError):
        function(rotary_cache)(torch.ones(1, 27), *rotate[1:])


@pytest.mark.parametrize("number", range(6))
def test_memory_that_is_not_the_host_s_is_not_read(number) -> None:
    """An address there would end the process."""
    op, arguments, _ = operands()[number]
    for place, given in enumerate(arguments):
        if isinstance(given, Tensor):
            elsewhere = (*arguments[:place], given.to("meta"), *arguments[place + 1 :])
            with pytest.raises((OpError, RuntimeError, NotImplementedError), match="meta"):
                function(op)(*elsewhere)


def test_bits_do_not_depend_on_the_thread_that_computes(randn) -> None:
    """Whether denormal numbers are zeros is a setting of each thread, and who calls decides."""
    query, keys = randn(8, 8, 64), randn(200, 16, 8, 64)
    tables = torch.arange(1, 161, dtype=torch.int32).view(8, 20)
    lengths, starts = torch.full((8,), 300, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    x, weight = randn(2, 512) * 1e-20, randn(1000, 512) * 1e-20
    tiny = keys * 1e-40

    def compute(values: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(query)
        function(paged_attention)(query, keys, values, tables, lengths, starts, out, 1.0, 0, 0.0, 1)
        return out, function(linear)(x, weight, None)

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        there = compute(tiny)  # makes the threads
        torch.set_flush_denormal(True)
        zeros = [compute(tiny) for _ in range(5)]
        torch.set_flush_denormal(False)
        again = compute(tiny)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    for each, other in zip(there, again, strict=True):
        assert torch.equal(each, other)
        assert each.view(torch.int32).ne(0).any()
    for found in zeros:
        assert all(each.view(torch.int32).eq(0).all() for each in found)
