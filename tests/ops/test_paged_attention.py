from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reprise.ops import OpTable, paged_attention
from reprise.ops.fp8_rows import dequantise, quantise
from reprise.ops.paged_attention.reference import visibility
from reprise.platforms import Platform

reference = paged_attention.implementations["reference"].function
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """Lengths of a batch and sizes of a model."""

    lengths: tuple[int, ...]
    """Tokens of each request; 0: padding."""
    new: tuple[int, ...]
    """New tokens of each request."""
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    window: int = 0
    cap: float = 0.0
    query_len: int = 0
    tail: int = 0
    """Rows behind the last request."""


def decode(*lengths: int, **sizes: Any) -> Case:
    return Case(lengths, (1,) * len(lengths), query_len=1, **sizes)


class Batch:
    """Requests scattered over a cache; every slot that holds no token of theirs is NaN."""

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0,
        codes: torch.dtype | None = None,
    ):  # fmt: skip
        """``codes``: what the cache has; ``keys`` and ``values`` are then what these stand for."""
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        size = case.block_size
        counts = [math.ceil(length / size) for length in case.lengths]
        blocks = sum(counts) + 3
        shape = (blocks, size, case.kv_heads, case.head_size)
        key_cache, value_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        key_cache, value_cache = key_cache.to(dtype), value_cache.to(dtype)
        # Table entries behind a request's blocks are stale, not zero.
        width = max(counts) + 2
        tables = torch.randint(0, blocks, (len(counts), width), generator=generator)
        free = (torch.randperm(blocks - 1, generator=generator) + 1).split([*counts, 2])
        self.keys = [randn(length, *shape[2:]) for length in case.lengths]
        self.values = [randn(length, *shape[2:]) for length in case.lengths]
        for row, length in enumerate(case.lengths):
            tables[row, : counts[row]] = free[row]
            slots = (free[row].unsqueeze(1) * size + torch.arange(size)).flatten()[:length]
            key_cache.flatten(0, 1)[slots] = self.keys[row]
            value_cache.flatten(0, 1)[slots] = self.values[row]
        self.starts = np.cumsum([0, *case.new])
        self.query = randn(int(self.starts[-1]) + case.tail, case.heads, case.head_size)
        self.arguments = {
            "query": self.query.to(device),
            "key_cache": key_cache.to(device),
            "value_cache": value_cache.to(device),
            "block_tables": tables.int().to(device),
            "seq_lens": torch.tensor(case.lengths, dtype=torch.int32).to(device),
            "query_start_loc": torch.tensor(self.starts, dtype=torch.int32).to(device),
            "scale": case.head_size**-0.5,
            "sliding_window": case.window,
            "soft_cap": case.cap,
            "query_len": case.query_len,
        }
        if codes is not None:
            self._quantise(codes)

    def _quantise(self, dtype: torch.dtype) -> None:
        for name, rows in (("key", self.keys), ("value", self.values)):
            # Rows of all magnitudes, so that a scale of another row shows.
            cache = self.arguments[f"{name}_cache"]
            cache *= 2.0 ** (torch.arange(cache[..., 0].numel()) % 7 - 3).to(cache).view(
                *cache.shape[:3], 1
            )
            codes, scales = quantise(cache, dtype)
            self.arguments[f"{name}_cache"] = codes
            self.arguments[f"{name}_scales"] = scales.transpose(1, 2).contiguous()
            back, size = dequantise(codes, scales), self.case.block_size
            for row, length in enumerate(self.case.lengths):
                blocks = self.arguments["block_tables"][row, : math.ceil(length / size)].long()
                rows[row] = back[blocks].flatten(0, 1)[:length].cpu()

    def run(self, function: Any) -> Tensor:
        out = torch.full_like(self.arguments["query"], torch.nan)
        assert function(out=out, **self.arguments) is None
        return out

    def dense(self) -> Tensor:
        """What each request attends to without a cache, by SDPA where SDPA can, in float64."""
        case = self.case
        out = torch.zeros(self.query.shape, dtype=torch.float64)
        for row, length in enumerate(case.lengths):
            begin, end = self.starts[row], self.starts[row + 1]
            if length == 0 or begin == end:
                continue
            query = self.query[begin:end].double().transpose(0, 1)
            group = case.heads // case.kv_heads
            keys, values = (
                each[row].double().transpose(0, 1).repeat_interleave(group, dim=0)
                for each in (self.keys, self.values)
            )
            mask = torch.ones(end - begin, length).tril(length - (end - begin)).bool()
            if case.window:
                mask &= ~torch.ones_like(mask).tril(length - (end - begin) - case.window)
            if case.cap:
                scores = query @ keys.mT * self.arguments["scale"]
                scores = case.cap * (scores / case.cap).tanh()
                attended = scores.masked_fill(~mask, -math.inf).softmax(-1) @ values
            else:
                attended = F.scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, scale=self.arguments["scale"]
                )
            out[begin:end] = attended.transpose(0, 1)
        return out


CASES = {
    "decode, every head its own keys": decode(1, 17, 33, heads=2, kv_heads=2, block_size=8),
    "decode, padding and tail rows": decode(5, 0, 40, 0, tail=3, head_size=96),
    "decode, padding without rows": Case((9, 33, 0, 0), (1, 1, 0, 0), query_len=1, tail=2),
    "decode, window": decode(3, 70, 500, heads=4, kv_heads=1, head_size=128, block_size=32,
                             window=40),
    "decode, soft cap": decode(2, 130, heads=8, kv_heads=1, head_size=256, block_size=128, cap=4.0),
    "decode, odd group and long context": decode(4500, 3, 300, heads=3, kv_heads=1, block_size=64),
    "decode, window in a long context": decode(4200, 2, 999, heads=2, kv_heads=1, window=700),
    "drafts": Case((3, 41, 300, 0), (3, 3, 3, 0), kv_heads=1, query_len=3, tail=4),
    "drafts, window and soft cap": Case((64, 600), (4, 4), heads=2, query_len=4, window=9, cap=3.0),
    "prefill alone": Case((37,), (37,), query_len=37, heads=2, kv_heads=1),
    "prefill of requests side by side": Case((20, 1, 33), (20, 1, 33), heads=2, kv_heads=2),
    "chunk with context, decode and padding": Case((5, 100, 0, 77, 64), (5, 30, 2, 1, 16), tail=9),
    "mixed, window": Case((70, 150, 12), (2, 20, 12), head_size=96, block_size=8, window=33),
    "mixed, window below a tile, soft cap": Case((40, 130), (17, 1), window=3, cap=5.0),
    "decode, tiny heads": decode(2, 70, heads=4, kv_heads=2, head_size=8),
    "mixed, tiny heads": Case((20, 90), (7, 10), heads=4, kv_heads=2, head_size=8),
    "mixed, large heads": Case((20, 90), (7, 10), heads=8, kv_heads=1, head_size=256),
    "mixed, odd group": Case((33, 80), (9, 21), heads=6, kv_heads=2, head_size=128, block_size=32),
    "nothing but padding": Case((0, 0), (1, 0), query_len=1, tail=1),
    "nothing but padding, mixed": Case((0, 0), (0, 3), tail=40),
}  # fmt: skip
CODED = (
    "decode, every head its own keys", "decode, padding and tail rows", "decode, window",
    "decode, soft cap", "drafts", "decode, tiny heads", "mixed, window below a tile, soft cap",
    "chunk with context, decode and padding", "mixed, odd group",
)  # fmt: skip
LARGE_CASES = {
    "decode of many": decode(*range(1, 1500, 13), 0, heads=16, kv_heads=8, head_size=128, tail=5),
    "decode of many of equal length": decode(*[200] * 40, heads=16, kv_heads=8, head_size=128),
    "one long among short": decode(30000, *[77] * 15, heads=32, kv_heads=8, head_size=128),
    "drafts in a long context": Case((20000, 4), (4, 4), 32, 8, 128, query_len=4),
    "prefill of 3000": Case((3000,), (3000,), 32, 8, 128),
    "chunks and decodes": Case((5000, 4000, *range(2, 60)), (1024, 777, *[1] * 58), 16, 8, 128,
                               tail=100),
    "long window": Case((5000, 4000), (1024, 1), 8, 4, 128, window=1024),
}  # fmt: skip
HALF_ON_CPU = ("decode, padding and tail rows", "chunk with context, decode and padding")


def cases_for(platform: Platform, name: str) -> Case:
    if name in LARGE_CASES and platform.device_type == "cpu":
        pytest.skip("takes minutes on the CPU")
    return (CASES | LARGE_CASES)[name]


@pytest.mark.parametrize("name", CASES)
def test_reference_attends_like_a_dense_model(platform, name) -> None:
    batch = Batch(CASES[name], torch.float32, platform.device)
    found = batch.run(reference)
    torch.testing.assert_close(found.cpu().double(), batch.dense(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation_name", ["triton", "torch", "cpp"])
@pytest.mark.parametrize("name", [*CASES, *LARGE_CASES])
def test_implementation(implementation, platform, dtypes, name, implementation_name) -> None:
    case = cases_for(platform, name)
    function = implementation(paged_attention, implementation_name)
    if implementation_name == "cpp":
        dtypes = (torch.float32, torch.bfloat16)
    elif platform.device_type == "cpu" and name not in HALF_ON_CPU:
        dtypes = (torch.float32,)
    if name in LARGE_CASES:
        dtypes = (torch.bfloat16,)
    for dtype in dtypes:
        batch = Batch(case, dtype, platform.device)
        found = batch.run(function)
        expected = batch.run(reference)
        assert found.dtype == dtype
        error = TOLERANCE[dtype]
        torch.testing.assert_close(found, expected, rtol=error, atol=error)


def fp8_of(platform: Platform) -> torch.dtype:
    if platform.fp8_dtype is None:
        pytest.skip("the device has no eight-bit floating-point numbers")
    return platform.fp8_dtype


@pytest.mark.parametrize("name", CODED)
def test_reference_attends_to_what_codes_stand_for(platform, name) -> None:
    batch = Batch(CASES[name], torch.float32, platform.device, codes=fp8_of(platform))
    found = batch.run(reference)
    torch.testing.assert_close(found.cpu().double(), batch.dense(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation_name", ["triton", "torch", "cpp"])
@pytest.mark.parametrize("name", [*CODED, *LARGE_CASES])
def test_implementation_on_codes(
    implementation, platform, dtypes, name, implementation_name
) -> None:
    case = cases_for(platform, name)
    function = implementation(paged_attention, implementation_name)
    if name in LARGE_CASES:
        dtypes = (torch.bfloat16,)
    elif platform.device_type == "cpu" and name not in HALF_ON_CPU:
        dtypes = (torch.float32,)
    for dtype in dtypes:
        batch = Batch(case, dtype, platform.device, codes=fp8_of(platform))
        found, expected = batch.run(function), batch.run(reference)
        assert found.dtype == dtype
        # Values of some rows are eight times as large as those of plain caches.
        error = 8 * TOLERANCE[dtype]
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=error)


def test_codes_are_as_near_to_numbers_as_they_can_be(platform) -> None:
    """Each element within 2 ** -4 of itself: so is a value, and a score nearly."""
    case = CASES["chunk with context, decode and padding"]
    plain = Batch(case, torch.float32, platform.device)
    expected = plain.dense()
    arguments = plain.arguments
    for name in ("key", "value"):
        codes, scales = quantise(arguments[f"{name}_cache"], fp8_of(platform))
        arguments[f"{name}_cache"] = codes
        arguments[f"{name}_scales"] = scales.transpose(1, 2).contiguous()
    found = plain.run(reference).cpu().double()
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 2**-4


@pytest.mark.parametrize("magnitude", [2.0**-90, 2.0**-20, 1.0, 2.0**20, 2.0**90])
@pytest.mark.parametrize("case", [decode(70, 9), Case((40,), (20,))], ids=["decode", "mixed"])
def test_triton_with_values_of_any_magnitude(implementation, platform, case, magnitude) -> None:
    """What float16 would not hold: values far from 1, and queries too."""
    function = implementation(paged_attention, "triton")
    dtype = torch.float32 if platform.device_type == "cpu" else torch.bfloat16
    batch = Batch(case, dtype, platform.device, codes=fp8_of(platform))
    batch.arguments["value_scales"] *= magnitude
    batch.arguments["query"] *= magnitude
    batch.arguments["key_scales"] /= magnitude
    expected = batch.run(reference).double() / magnitude
    found = batch.run(function).double() / magnitude
    error = 8 * TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=error)


@pytest.mark.parametrize(
    "case", [decode(500, 33), Case((60, 40), (30, 40))], ids=["decode", "mixed"]
)
def test_triton_gives_the_same_bits_again(implementation, platform, case) -> None:
    function = implementation(paged_attention, "triton")
    batch = Batch(case, torch.float16, platform.device)
    assert torch.equal(batch.run(function), batch.run(function))


@pytest.mark.parametrize("name", ["torch", "cpp"])
@settings(max_examples=30)
@given(data=st.data())
def test_the_host_on_any_batch(platform, name, data: st.DataObject) -> None:
    if paged_attention.implementations[name].requires(platform):
        pytest.skip("no C++ compiler")
    function = paged_attention.implementations[name].function
    batch = Batch(data.draw(batches(longest=80)), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(batch.run(function), batch.run(reference), rtol=2e-5, atol=2e-5)


@settings(max_examples=6)
@given(data=st.data())
def test_triton_on_any_batch(platform, data: st.DataObject) -> None:
    if paged_attention.implementations["triton"].requires(platform):
        pytest.skip("no Triton")
    function = paged_attention.implementations["triton"].function
    batch = Batch(data.draw(batches(longest=80)), torch.float16, platform.device)
    torch.testing.assert_close(batch.run(function), batch.run(reference), rtol=4e-3, atol=4e-3)


def batches(longest: int) -> st.SearchStrategy[Case]:
    @st.composite
    def draw(draw: Any) -> Case:
        query_len = draw(st.sampled_from([0, 1, 3]))
        lengths, new = [], []
        for _ in range(draw(st.integers(1, 4))):
            if draw(st.integers(0, 5)) == 0:
                lengths.append(0)
                new.append(draw(st.sampled_from([0, query_len])))
            else:
                lengths.append(draw(st.integers(max(1, query_len), longest)))
                new.append(query_len or draw(st.integers(1, min(20, lengths[-1]))))
        return Case(
            tuple(lengths),
            tuple(new),
            block_size=draw(st.sampled_from([8, 16, 64])),
            window=draw(st.sampled_from([0, 1, 7, 40])),
            cap=draw(st.sampled_from([0.0, 2.0])),
            query_len=query_len,
            tail=draw(st.integers(0 if sum(new) else 1, 5)),
        )

    return draw()


@pytest.mark.parametrize(
    ("bound", "live"),
    [(decode(300, 1, 40), decode(17, 0, 500)), (Case((40, 9), (30, 9)), Case((70, 33), (6, 33)))],
    ids=["decode", "mixed"],
)
def test_a_bound_call_follows_the_values_of_the_moment(platform, bound, live) -> None:
    if paged_attention.implementations["triton"].requires(platform):
        pytest.skip("no Triton")
    function = paged_attention.implementations["triton"].function
    static, live_batch = static_buffers(bound, live, platform)
    out = torch.full_like(static["query"], torch.nan)
    again = function.bind(out=out, **static)
    for name, value in live_batch.arguments.items():
        if isinstance(value, Tensor):
            static[name].copy_(value)
    out.fill_(torch.nan)
    again()
    torch.testing.assert_close(out, live_batch.run(reference), rtol=4e-3, atol=4e-3)


def static_buffers(first: Case, then: Case, platform: Platform) -> tuple[dict[str, Any], Batch]:
    """Copies of the first case's arguments that the second's fit into, and the second."""
    arguments = Batch(first, torch.float16, platform.device).arguments
    batch = Batch(then, torch.float16, platform.device)
    for name in ("key_cache", "value_cache", "block_tables"):
        pair = (arguments[name], batch.arguments[name])
        shape = [max(sizes) for sizes in zip(*(each.shape for each in pair), strict=True)]
        for each, target in zip(pair, (arguments, batch.arguments), strict=True):
            target[name] = each.new_zeros(shape)
            target[name][tuple(slice(size) for size in each.shape)] = each
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}, batch


@pytest.mark.parametrize("implementation_name", ["triton", "torch", "cpp", "reference"])
def test_blocks_behind_the_window_may_hold_anything(
    implementation, platform, implementation_name
) -> None:
    """An engine gives such blocks to other requests, and their entries to the null block."""
    function = implementation(paged_attention, implementation_name)
    for case in (decode(300, 90, window=50), Case((300, 90), (20, 5), window=50)):
        batch = Batch(case, torch.float32, platform.device)
        expected = batch.run(reference)
        for row, (length, new) in enumerate(zip(case.lengths, case.new, strict=True)):
            freed, rest = divmod(length - new - case.window + 1, case.block_size)
            table = batch.arguments["block_tables"][row]
            for cache in (batch.arguments["key_cache"], batch.arguments["value_cache"]):
                cache[table[:freed].long()] = torch.nan
                cache[table[freed].long(), :rest] = torch.nan
            table[: freed - row] = 0
        torch.testing.assert_close(batch.run(function), expected, rtol=2e-5, atol=2e-5)


def test_triton_takes_views_of_larger_tensors(implementation, platform) -> None:
    """Queries inside a fused projection, keys beside values in one cache, a padded output."""
    function = implementation(paged_attention, "triton")
    for case in (decode(5, 300, 0, tail=1), Case((40, 70), (9, 30), tail=2)):
        batch = Batch(case, torch.float32, platform.device)
        expected = batch.run(reference)
        arguments = dict(batch.arguments)
        cache = torch.stack((arguments["key_cache"], arguments["value_cache"]), dim=1)
        arguments["key_cache"], arguments["value_cache"] = cache.unbind(1)
        query = arguments["query"]
        arguments["query"] = torch.cat((query, query), dim=1)[:, : case.heads]
        wide = query.new_full((len(query), case.heads + 1, case.head_size + 8), torch.nan)
        function(out=wide[:, 1:, 8:], **arguments)
        torch.testing.assert_close(wide[:, 1:, 8:], expected, rtol=2e-5, atol=2e-5)
        assert wide[:, 0].isnan().all()
        assert wide[:, :, :8].isnan().all()


@pytest.mark.parametrize("query_len", [0, 1])
def test_rows_without_any_request_are_cleared(implementation, platform, query_len) -> None:
    batch = Batch(decode(5), torch.float32, platform.device)
    out = torch.full((3, 4, 64), torch.nan, device=platform.device)
    nothing = {
        "query": torch.zeros_like(out),
        "block_tables": batch.arguments["block_tables"][:0],
        "seq_lens": batch.arguments["seq_lens"][:0],
        "query_start_loc": batch.arguments["query_start_loc"][:1],
        "out": out,
        "query_len": query_len,
    }
    implementation(paged_attention, "triton")(**{**batch.arguments, **nothing})
    assert not out.any()


ONE_TILE = {
    "one request": decode(200, tail=3),
    "whole tiles, one more, one less": decode(1, 129, 128, 130, 257, heads=8, head_size=128),
    "padding": Case((37, 0, 200, 0, 0), (1, 1, 1, 1, 0), heads=8, query_len=1, tail=3),
    "soft cap, one KV head": decode(2, 130, heads=8, kv_heads=1, block_size=128, cap=4.0),
    "two requests, every head its own keys": decode(40, 300, heads=2, head_size=16),
}


@pytest.mark.parametrize("name", ONE_TILE)
def test_programs_with_one_tile_of_keys(implementation, platform, monkeypatch, name) -> None:
    """The newest key has no tile. The interpreter's device would have too few programs."""
    function, case = implementation(paged_attention, "triton"), ONE_TILE[name]
    split_kernel = importlib.import_module("reprise.ops.paged_attention.split_kernel")
    on_a_cpu = platform.device_type == "cpu"
    if on_a_cpu:
        size = 64 if len(case.lengths) == 1 else 128
        tiles = sum(max(1, math.ceil((length - 1) / size)) for length in case.lengths)
        enough = split_kernel.limits(platform.device)._replace(
            multiprocessors=tiles * case.kv_heads
        )
        monkeypatch.setattr(split_kernel, "limits", lambda device: enough)
        monkeypatch.setattr(split_kernel, "programs_of", lambda requests, most: most)
        # What walks over tiles is not needed, but where there is one tile too many.
        monkeypatch.setattr(split_kernel, "attend", None)
    for dtype in (torch.float16, torch.bfloat16) if not on_a_cpu else (torch.float32,):
        batch, error = Batch(case, dtype, platform.device), TOLERANCE[dtype]
        found = batch.run(function)
        torch.testing.assert_close(found, batch.run(reference), rtol=error, atol=error)
    if on_a_cpu:
        fewer = enough._replace(multiprocessors=(tiles - 1) * case.kv_heads)
        monkeypatch.setattr(split_kernel, "limits", lambda device: fewer)
        with pytest.raises(Exception, match="not callable"):
            batch.run(function)


def test_three_requests_of_two_heads_a_kv_head_are_walked_over(platform, monkeypatch) -> None:
    if platform.device_type != "cpu":
        pytest.skip("what a kernel calls is seen in the interpreter alone")
    if paged_attention.implementations["triton"].requires(platform):
        pytest.skip("no Triton")
    split_kernel = importlib.import_module("reprise.ops.paged_attention.split_kernel")
    enough = split_kernel.limits(platform.device)._replace(multiprocessors=64)
    monkeypatch.setattr(split_kernel, "limits", lambda device: enough)
    monkeypatch.setattr(split_kernel, "attend", None)
    function = paged_attention.implementations["triton"].function
    Batch(decode(5, 9), torch.float32, platform.device).run(function)
    with pytest.raises(Exception, match="not callable"):
        Batch(decode(5, 9, 7), torch.float32, platform.device).run(function)


def test_triton_refuses_caches_of_different_layout(implementation, platform) -> None:
    function = implementation(paged_attention, "triton")
    batch = Batch(decode(5), torch.float32, platform.device)
    batch.arguments["value_cache"] = batch.arguments["value_cache"].mT.contiguous().mT
    with pytest.raises(ValueError, match="caches of keys and values must have equal strides"):
        batch.run(function)


@pytest.mark.parametrize(
    ("captured", "live"),
    [
        (decode(1, 1, 1, 0), decode(700, 33, 0, 1)),
        (decode(500, 400), decode(1, 0)),
        (Case((9, 9), (3, 3), query_len=3), Case((300, 7), (3, 3), query_len=3)),
        (Case((40, 3), (40, 3)), Case((90, 150), (33, 10))),
        (Case((40, 3), (40, 3)), Case((30, 0), (30, 0), tail=13)),
    ],
    ids=["longer", "shorter", "drafts", "mixed", "mixed with padding"],
)
def test_triton_in_a_graph_follows_the_lengths_of_the_moment(platform, captured, live) -> None:
    if not platform.has_graphs or paged_attention.implementations["triton"].requires(platform):
        pytest.skip("no device graphs with Triton here")
    static, then = static_buffers(captured, live, platform)
    out = torch.full_like(static["query"], torch.nan)
    with OpTable(platform, {"paged_attention": "triton"}).activate():
        paged_attention(out=out, **static)  # compiles
        graph = platform.new_graph()
        graph.capture(lambda: paged_attention(out=out, **static))
        for name, value in then.arguments.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        out.fill_(torch.nan)
        graph.replay()
    platform.synchronize()
    torch.testing.assert_close(out, then.run(reference), rtol=4e-3, atol=4e-3)


def test_triton_addresses_caches_beyond_2_to_the_31_elements(implementation, platform) -> None:
    if platform.device_type == "cpu":
        pytest.skip("needs 9 GB of memory that the interpreter would copy")
    function = implementation(paged_attention, "triton")
    for case in (decode(200, 40, head_size=128), Case((200,), (40,), head_size=128)):
        batch = Batch(case, torch.float16, platform.device)
        expected = batch.run(reference)
        arguments = batch.arguments
        used = arguments["key_cache"].shape[0]
        blocks = 2**31 // arguments["key_cache"][0].numel() + used
        for name in ("key_cache", "value_cache"):
            far = arguments[name].new_empty((blocks, *arguments[name].shape[1:]))
            far[-used:] = arguments[name]
            arguments[name] = far
        arguments["block_tables"] += blocks - used
        torch.testing.assert_close(batch.run(function), expected, rtol=4e-3, atol=4e-3)
        del far, arguments, batch


def test_visibility() -> None:
    assert visibility(2, 4, 0, torch.device("cpu")).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert visibility(2, 4, 2, torch.device("cpu")).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]
