"""Kernels whose bits of a row depend on that row alone: at every number of rows at which others
change, wherever a step ends, whether programs share a tile or not. Under the interpreter, which
shows the order of sums; that a device's instructions keep it is for the conformance kit there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from helpers import HYBRIDS, TinyModels, make_llm
from matrix import CHECKPOINT
from torch import Tensor

pytest.importorskip("triton")

from reprise import ops
from reprise.doctor import compositions
from reprise.errors import OpError
from reprise.layers import gated_delta as layer
from reprise.ops import OpTable
from reprise.ops.causal_conv.triton import invariant as causal_conv
from reprise.ops.experts import triton_invariant as experts
from reprise.ops.fp8_linear import quantise_kernel
from reprise.ops.fp8_linear import triton_invariant as fp8_invariant
from reprise.ops.gated_delta.triton import invariant as gated_delta
from reprise.ops.linear import reference, shared_sums_kernel, triton_invariant
from reprise.ops.paged_attention import absolute_decode_kernel as decodes
from reprise.ops.paged_attention import absolute_splits_kernel as attention
from reprise.ops.paged_attention.reference import reference as exact_attention
from reprise.ops.triton_util import DeviceLimits
from reprise.platforms import Platform
from reprise.platforms.cpu import CpuPlatform

THRESHOLDS = (1, 2, 3, 4, 7, 8, 16, 17, 32, 33, 64, 65, 127, 128, 129)
LLAMA = {
    "linear", "linear_into", "norm_linear", "norm_gated_linear", "linear_add", "paged_attention",
}  # fmt: skip
DRAWS = {"sample", "silu_and_mul", "rms_norm", "rotary_cache"}
MIXTURE = {"route", "experts", "experts_add"}
HYBRID = {"gated_delta", "causal_conv", "gated_rms_norm", "sigmoid_and_mul"}


@pytest.fixture
def make(device: str) -> Callable[..., Tensor]:
    if device != "cpu":
        pytest.skip("the conformance kit compares them on a device")
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "parts"), [(70, 512, 2), (130, 90, 1), (96, 64, 1), (70, 480, 2)]
)
def test_a_row_of_a_product(
    make: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    outputs: int,
    inputs: int,
    parts: int,
    dtype: torch.dtype,
) -> None:
    """Few rows are shared out to several programs, many are not."""
    x, weight = make(150, inputs, dtype=dtype), make(outputs, inputs) * inputs**-0.5
    weight = weight.to(dtype)
    bias, residual = make(outputs, dtype=dtype), make(150, outputs, dtype=dtype)
    wide = dtype is torch.float32
    assert shared_sums_kernel.parts_of(outputs, inputs, 4) == parts
    monkeypatch.setattr(shared_sums_kernel, "_TOGETHER", 2)  # of three tiles of rows
    whole = triton_invariant.linear(x, weight, bias)
    error = (whole.float() - reference.linear(x, weight, bias).float()).abs().max()
    assert error < (1e-5 if wide else 0.04)
    added = residual.clone()
    triton_invariant.linear_add(x, weight, bias, added)
    for rows in THRESHOLDS[:: 4 if wide else 2]:
        some = slice(150 - rows, None)
        assert torch.equal(triton_invariant.linear(x[some], weight, bias), whole[some])
        again = residual[some].clone()
        triton_invariant.linear_add(x[some], weight, bias, again)
        assert torch.equal(again, added[some])


@pytest.mark.parametrize("rows", [1, 9, 17, 33, 65, 300])
def test_every_size_of_tile_computes_the_product(
    make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Of whole numbers, whose sums are exact in any order."""
    kernel = shared_sums_kernel
    config = kernel.config_of(rows, 128, 512, 1, 2, torch.bfloat16)
    monkeypatch.setattr(kernel, "_ONE", config)
    for outputs, inputs in ((70, 512), (130, 90), (96, 64), (70, 480)):
        x, weight = (make(n, inputs).mul(3).round().bfloat16() for n in (rows, outputs))
        out = torch.ones(rows, outputs)
        kernel.launch_product(x, weight, None, out, add=True)
        assert torch.equal(out, 1 + x.float() @ weight.float().t())


def test_programs_share_the_inputs_of_a_small_weight_for_many_rows(
    make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole numbers, as above."""
    kernel, programs = shared_sums_kernel, []
    parts = kernel.parts_of(64, 512, 2)
    config = kernel.config_of(200, 64, 512, parts, 2, torch.bfloat16)
    assert config.shared
    assert config.rows < 200
    assert not kernel.config_of(200, 64, 1 << 18, parts, 2, torch.bfloat16).shared
    monkeypatch.setattr(kernel, "_ONE", config)
    original = kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda what, grid: programs.append(grid) or original(what, grid)
    )
    x, weight = (make(n, 512).mul(3).round().bfloat16() for n in (200, 64))
    out = torch.ones(200, 64)
    kernel.launch_product(x, weight, None, out, add=True)
    assert torch.equal(out, 1 + x.float() @ weight.float().t())
    assert programs == [(2 * parts,)]  # two tiles of rows


def test_a_row_of_a_product_of_fewer_bits(make: Callable[..., Tensor]) -> None:
    x, norm = make(150, 256, dtype=torch.bfloat16), make(256, dtype=torch.bfloat16)
    eight = (make(144, 256).to(torch.float8_e4m3fn), make(2, 2).abs(), None, 128, 128)
    words = torch.randint(1 << 31, (144, 32), generator=torch.Generator().manual_seed(1))
    scales = (make(144, 2, dtype=torch.bfloat16).abs(), None, None, 128)
    four = (words.to(torch.int32), *scales)
    for kind, weight in (("fp8", eight), ("w4", four)):
        for name in ("norm_gated_linear", "linear_add"):
            op = getattr(ops, f"{kind}_{name}")
            compute = op.implementations["triton_invariant"].function
            results = {}
            for rows in (150, 1, 17, 70):
                some = x[150 - rows :]
                if name == "linear_add":
                    found = torch.zeros(rows, 144, dtype=x.dtype)
                    compute(some, found, *weight)
                else:
                    found = compute(some, *((norm, 1e-6) if "norm" in name else ()), *weight)
                results[rows] = found
                assert torch.equal(found, results[150][150 - rows :]), (op.name, rows)


@pytest.mark.parametrize("name", ["fp8_norm_linear", "fp8_norm_gated_linear"])
def test_a_norm_before_eight_bits_is_summed_by_as_many_threads(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their number is the order of the sum, which the interpreter does not show."""
    launched: set[tuple[tuple[str, Any], ...]] = set()

    def note(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> None:
            launched.add(tuple(options.items()))

        return run

    monkeypatch.setattr(quantise_kernel, "launch", note)
    monkeypatch.setattr(fp8_invariant, "launch_product", lambda *args, **options: None)
    function = getattr(fp8_invariant, name)
    wide = torch.zeros(256, 1024, dtype=torch.float8_e4m3fn, device=device)
    for rows in THRESHOLDS:
        x = torch.zeros(rows, 1024, device=device)
        function(x, x[0], 1e-6, wide, x.new_zeros(2, 8), None, 128, 128)
    assert len(launched) == 1


def test_a_weight_that_is_made_now_is_waited_for(
    make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product starts before the kernel in front of it has ended, and reads its weight at once:
    what that kernel writes is not there yet."""
    asked: list[bool] = []
    options = shared_sums_kernel.launch_options

    def noted(early: bool = True) -> Mapping[str, Any]:
        asked.append(early)
        return options(early)

    monkeypatch.setattr(shared_sums_kernel, "launch_options", noted)
    x, residual, norm = make(3, 64), make(3, 32), make(64)
    four = (torch.zeros(32, 8, dtype=torch.int32), make(32, 1), None, None, 64)
    for name in ("linear", "norm_linear", "norm_gated_linear", "linear_add"):
        compute = getattr(ops, f"w4_{name}").implementations["triton_invariant"].function
        with_norm = (norm, 1e-6) if "norm" in name else ()
        compute(x, *((residual,) if name == "linear_add" else with_norm), *four)
    assert asked == [False] * 4
    triton_invariant.linear(x, make(64, 32).t(), None)
    assert asked.pop() is False
    triton_invariant.linear(x, make(32, 64), None)
    assert asked.pop() is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        (4096, 4096),
        (4096, 1024),
        (6144, 1024),
        (1024, 3072),
        (24576, 512),
        (300, 1000),
        (64, 96),
        (96, 64),
    ],
)
def test_a_row_of_a_product_on_a_device(
    device: str, platform: Platform, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    """Of numbers whose products cancel, so that every other order of a sum leaves something else,
    in every size of tile."""
    if device == "cpu":
        pytest.skip("a device's own instructions are compared")
    torch.manual_seed(outputs)
    order = torch.randperm(inputs, device=device)
    half = torch.randn(2600, inputs // 2, device=device)
    x = torch.cat((half, -half), dim=1)[:, order].to(dtype).contiguous()
    some = torch.randn(outputs, inputs // 2, device=device)
    weight = torch.cat((some, some), dim=1)[:, order].to(dtype).contiguous()
    residual = torch.randn(2600, outputs, device=device) * 2**-20
    results = {}
    for rows in (2600, 1, 8, 9, 17, 33, 65, 96, 128, 129, 200, 300, 700):
        out = residual[2600 - rows :].clone()
        with OpTable(platform).activate():
            shared_sums_kernel.launch_product(x[2600 - rows :], weight, None, out, add=True)
        results[rows] = out
        assert torch.equal(out, results[2600][2600 - rows :]), rows
    assert results[2600].abs().max() > 0


def test_parts_follow_from_the_weight_and_have_several_steps() -> None:
    kernel = shared_sums_kernel
    for outputs, inputs in itertools.product((256, 1024, 4096, 24576), (64, 1024, 4096, 12288)):
        parts = kernel.parts_of(outputs, inputs, 132)
        assert -(-inputs // kernel._UNIT) % parts == 0
        assert parts * -(-outputs // kernel._TILE) <= max(132, -(-outputs // kernel._TILE))
        for rows in (1, 8, 9, 17, 65, 129, 4096):
            for dtype in (torch.bfloat16, torch.float32):
                config = kernel.config_of(rows, outputs, inputs, parts, 132, dtype)
                assert kernel._UNIT % config.block_k == 0


class Attention:
    """Attention of one long request in steps of any kind, beside another one or alone."""

    def __init__(
        self, make: Callable[..., Tensor], dtype: torch.dtype, window: int, cap: float,
        heads: int = 4,
    ):  # fmt: skip
        self.length, self.window, self.cap, self.make, self.heads = 300, window, cap, make, heads
        caches = [make(41, 16, 2, 32, dtype=dtype) for _ in range(2)]
        for each in caches:
            each[0] = torch.nan
        self.caches = caches
        self.query = make(self.length, heads, 32, dtype=dtype)
        order = 1 + torch.randperm(40, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(2, 20).int()

    def run(self, compute: Callable[..., None], begin: int, end: int, query_len: int, before: int):
        others = self.make(before, self.heads, 32, dtype=self.query.dtype)
        queries = [others, self.query[begin:end]]
        counts, lengths = [before, end - begin], [before + 37, end]
        first = 0 if before else 1
        starts = torch.tensor([0, *itertools.accumulate(counts[first:])], dtype=torch.int32)
        query = torch.cat(queries)
        out = torch.full_like(query, 9.0)
        compute(
            query, *self.caches, self.tables[first:].contiguous(),
            torch.tensor(lengths[first:], dtype=torch.int32), starts, out, 32**-0.5,
            self.window, self.cap, query_len,
        )  # fmt: skip
        return out[before:]


@pytest.mark.parametrize(
    ("dtype", "window", "cap"),
    [(torch.float32, 0, 0.0), (torch.bfloat16, 0, 0.0), (torch.float32, 100, 30.0)],
)
def test_attention_of_a_token(
    make: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    window: int,
    cap: float,
) -> None:
    """Decodes, drafts and chunks that end before, at and behind the border of a split."""
    monkeypatch.setattr(attention, "SPLIT", 256)
    case = Attention(make, dtype, window, cap)
    whole = case.run(attention.paged_attention, 240, 300, 0, 0)
    exact = case.run(exact_attention, 240, 300, 0, 0)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-5 if dtype.itemsize == 4 else 1e-2)
    # Without parts: the kernel for decodes of many requests.
    for begin, end, query_len, before, parts in (
        (299, 300, 1, 0, 2), (299, 300, 1, 1, 0), (270, 274, 4, 4, 2), (252, 278, 0, 3, 2),
        (240, 257, 0, 0, 1), (255, 256, 1, 0, 0), (256, 258, 2, 2, 1), (270, 274, 4, 4, 0),
    ):  # fmt: skip
        monkeypatch.setattr(attention, "parts_of", lambda *_, parts=parts: parts)
        monkeypatch.setattr(attention, "_FEW_REQUESTS", 16 if parts else 0)
        some = case.run(attention.paged_attention, begin, end, query_len, before)
        assert torch.equal(some, whole[begin - 240 : end - 240]), (begin, end, before, parts)


@pytest.mark.parametrize(
    ("query_len", "window", "dtype"),
    [(1, 0, torch.bfloat16), (2, 50, torch.float32)],
    ids=str,
)
def test_decodes_of_many_requests_are_those_of_few(
    make: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    query_len: int,
    window: int,
    dtype: torch.dtype,
) -> None:
    """Wherever one program's part of all keys ends: with more programs than splits, and fewer."""
    monkeypatch.setattr(attention, "SPLIT", 64)
    lengths = torch.tensor([150, 2, 64, 65, 0, 131, 128, 0], dtype=torch.int32)
    counts = torch.tensor([query_len if each else 0 for each in lengths], dtype=torch.int32)
    starts = torch.cat((counts[:1] * 0, counts.cumsum(0))).int()
    caches = [make(81, 16, 2, 32, dtype=dtype) for _ in range(2)]
    for each in caches:
        each[0] = torch.nan
    tables = 1 + torch.randperm(80, generator=torch.Generator().manual_seed(0)).view(8, 10).int()
    arguments = (
        make(8 * query_len, 4, 32, dtype=dtype), *caches, tables, lengths, starts,
    )  # fmt: skip
    results = []
    for few, programs in ((16, 0), (0, 3), (0, 20)):
        monkeypatch.setattr(attention, "_FEW_REQUESTS", few)
        monkeypatch.setattr(decodes, "_SHARE", programs)
        out = torch.full((8 * query_len, 4, 32), 9.0, dtype=dtype)
        attention.paged_attention(*arguments, out, 32**-0.5, window, 0.0, query_len)
        results.append(out)
    exact = torch.empty_like(results[0])
    exact_attention(*arguments, exact, 32**-0.5, window, 0.0, query_len)
    torch.testing.assert_close(results[0], exact, rtol=0, atol=2e-2)
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("heads", [6, 10, 14])
def test_attention_where_groups_do_not_fill_a_tile(
    make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """What is left of a tile behind its tokens is the next one's."""
    monkeypatch.setattr(attention, "SPLIT", 64)
    monkeypatch.setattr(attention, "parts_of", lambda *_: 2)
    case = Attention(make, torch.float32, 0, 0.0, heads)
    found = case.run(attention.paged_attention, 180, 200, 0, 3)
    exact = case.run(exact_attention, 180, 200, 0, 3)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("query_len", "parts", "few"), [(0, 1, 16), (0, 2, 16), (2, 1, 16), (2, 2, 16), (2, 1, 0)]
)
def test_attention_of_padding_is_zero(
    make: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    query_len: int,
    parts: int,
    few: int,
) -> None:
    """Of requests without a length too, whose tokens others lie behind."""
    monkeypatch.setattr(attention, "SPLIT", 64)
    monkeypatch.setattr(attention, "_FEW_REQUESTS", few)
    monkeypatch.setattr(attention, "parts_of", lambda *_: parts)
    caches = [make(7, 16, 2, 32) for _ in range(2)]
    out = torch.full((7, 4, 32), 9.0)
    arguments = (
        make(7, 4, 32), *caches, torch.tensor([[0] * 6, [1, 2, 3, 4, 5, 6]], dtype=torch.int32),
        torch.tensor([0, 90], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32),
    )  # fmt: skip
    for _ in range(2):  # what the first leaves is the second's
        attention.paged_attention(*arguments, out, 32**-0.5, 0, 0.0, query_len)
        exact = torch.empty_like(out)
        exact_attention(*arguments, exact, 32**-0.5, 0, 0.0, query_len)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-5)
        assert not out[[0, 1, 4, 5, 6]].any()
        out.fill_(9.0)


def test_few_programs_share_tiles_and_many_do_not() -> None:
    device = DeviceLimits(132, 1 << 18)
    assert attention.parts_of(8, 16, device) == 16
    assert attention.parts_of(8, 512, device) == 32
    assert attention.parts_of(200, 512, device) == 1


def test_steps_of_any_size_need_few_kernels() -> None:
    """Each is compiled for seconds, and a size that nobody foresaw while requests wait."""
    device = DeviceLimits(132, 1 << 18)
    numbers = range(1, 600)
    assert len({attention.parts_of(n, splits, device) for n in numbers for splits in numbers}) <= 7


def test_experts_of_a_row(make: Callable[..., Tensor]) -> None:
    x, weights = make(40, 32), make(40, 2).abs()
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(40)]).int()
    ids[7] = -1
    gate_up, down = make(6, 48, 32), make(6, 32, 24)
    whole = experts.experts(x, weights, ids, gate_up, down)
    exact = ops.experts.implementations["reference"].function(x, weights, ids, gate_up, down)
    torch.testing.assert_close(whole, exact, rtol=1e-4, atol=1e-3)
    for rows in (1, 2, 3, 17, 33):
        some = slice(40 - rows, None)
        found = experts.experts(x[some], weights[some], ids[some], gate_up, down)
        assert torch.equal(found, whole[some])


def cuts(tokens: int) -> Iterator[tuple[int, ...]]:
    yield from ((tokens,), (1,) * tokens, (8, 1, tokens - 9), (tokens - 1, 1))


def in_steps(
    compute: Callable[..., None], state: Tensor, lengths: tuple[int, ...], out: Tensor,
    *given: Any, rows: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A request's tokens in steps of these lengths: what it gets, and its state behind them."""
    state, found, done = state.clone(), [], 0
    for count in lengths:
        some = slice(done, done + count)
        mine = torch.empty_like(out[some])
        compute(
            *(each[some] for each in rows), *given, state, torch.tensor([1], dtype=torch.int32),
            torch.tensor([0, count], dtype=torch.int32),
            torch.tensor([done + count], dtype=torch.int32), torch.tensor([done == 0]), mine,
            count if count <= 8 else 0,
        )  # fmt: skip
        found.append(mine)
        done += count
    return torch.cat(found), state


def test_a_state_wherever_steps_end(make: Callable[..., Tensor]) -> None:
    tokens = 12
    qkv, a, b = make(tokens, 64), make(tokens, 4), make(tokens, 4)
    state, out = make(2, 4, 8, 8), make(tokens, 4, 8)
    results = [
        in_steps(gated_delta, state, each, out, make(4) * 0, make(4) * 0, rows=(qkv, a, b))
        for each in cuts(tokens)
    ]
    for answer, after in results[1:]:
        assert torch.equal(answer, results[0][0])
        assert torch.equal(after, results[0][1])


def test_a_window_wherever_steps_end(make: Callable[..., Tensor]) -> None:
    tokens = 12
    x, weight, state, out = make(tokens, 40), make(40, 4), make(2, 3, 40), make(tokens, 40)
    results = [in_steps(causal_conv, state, each, out, weight, rows=(x,)) for each in cuts(tokens)]
    for answer, after in results[1:]:
        assert torch.equal(answer, results[0][0])
        assert torch.equal(after, results[0][1])


class Accelerator(CpuPlatform):
    """A device whose kernels are Triton's, and whose tensors the host cannot read."""

    name = "somewhere"
    device_type = "somewhere"
    preferred = {"*": ("triton", "torch", "reference")}  # noqa: RUF012

    @property
    def has_triton(self) -> bool:
        return True


def test_a_device_with_triton_has_what_models_need() -> None:
    table = OpTable(Accelerator(), batch_invariant=True)
    for name in LLAMA | DRAWS | MIXTURE | HYBRID:
        assert table.candidates[name], name
        assert table.chosen[name].name in ("triton", "triton_invariant", "reference"), name
    assert table.chosen["linear"].name == "triton_invariant"
    without = OpTable(Accelerator())
    assert "triton_invariant" not in {each.name for each in without.chosen.values()}
    # What has none is refused, with its name.
    assert "swiglu_clamp" not in table.chosen
    with table.activate(), pytest.raises(OpError, match="entation of swiglu_clamp on somewhere"):
        ops.swiglu_clamp(torch.ones(1, 2), 1.0)


def test_logits_of_every_step_are_of_one_op(
    tiny: TinyModels, device: str, make: Callable[..., Tensor]
) -> None:
    """Whatever is chosen for one op alone: those of prompts land in new memory, those of decodes in
    memory that graphs know."""
    llm = make_llm(
        tiny("llama"), device, batch_invariant=True, ops={"linear_into": "triton_invariant"}
    )
    model = llm.engine.runner.model
    hidden = make(5, model.hidden_size)
    out = hidden.new_empty(5, model.vocab_size)
    with torch.inference_mode(), llm.engine.runner.active():
        assert torch.equal(model.logits(hidden), model.logits(hidden, out))
        assert not torch.equal(model.lm_head(hidden), out), "another op rounds otherwise"


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_5"])
def test_engines_with_these_kernels(
    tiny: TinyModels, device: str, make: Callable[..., Tensor], monkeypatch: Any, family: str
) -> None:
    """All of a model's ops by the interpreter, in batches that come and go."""
    monkeypatch.setattr(layer, "STATE", CHECKPOINT)
    fields = {"num_hidden_layers": 2}
    if family in HYBRIDS:
        fields["full_attention_interval"] = 2
    model = tiny(family, **fields)
    names = LLAMA | (MIXTURE if "moe" in family else set())
    names |= HYBRID - {"sigmoid_and_mul", "gated_rms_norm"} if family in HYBRIDS else set()
    own = {"route"} & names  # its one kernel is
    chosen = {**dict.fromkeys(names - own, "triton_invariant"), **dict.fromkeys(own, "triton")}
    common = {
        "batch_invariant": True, "block_size": 8, "max_num_seqs": 4, "num_blocks": 120,
        "ops": chosen,
    }  # fmt: skip
    plain = make_llm(model, device, **common, enable_prefix_caching=False)
    subjects = compositions.make_subjects(plain.engine.vocab_size, 48, 4)
    expected = compositions.alone(plain, subjects)
    llm = make_llm(model, device, **common, max_num_batched_tokens=20)
    found = compositions.run(llm, subjects, expected, 12)
    print(found)
    assert not found.wrong, found.wrong
    assert max(found.rows) > 2
