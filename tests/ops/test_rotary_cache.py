from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reprise.layers import identity_table
from reprise.ops import rotary_cache
from reprise.ops.fp8_rows import quantise

EPS = 1e-6
BLOCKS, BLOCK_SIZE = 6, 8
reference = rotary_cache.implementations["reference"].function


def angles(positions: int, rotary: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position: each [P, rotary / 2]."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
    angle = torch.arange(positions).unsqueeze(1) * frequencies
    return angle.cos(), angle.sin()


def make(
    randn, tokens: int, heads: int, kv_heads: int, head_size: int, rotary: int, dtype: torch.dtype
) -> dict:
    """Arguments: the last two tokens are padding, unwritten cache slots hold NaN."""
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_size, dtype=dtype)
    device = qkv.device
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randperm((BLOCKS - 1) * BLOCK_SIZE, generator=generator)[:tokens] + BLOCK_SIZE
    slots[max(1, tokens - 2) :] = 0
    cache = torch.full((BLOCKS, BLOCK_SIZE, kv_heads, head_size), torch.nan, dtype=dtype)
    return {
        "qkv": qkv,
        "positions": torch.randint(0, 50, (tokens,), generator=generator).to(device),
        "cos_sin": torch.cat(angles(50, rotary), dim=1).to(device),
        "slot_mapping": slots.to(device),
        "key_cache": cache.to(device),
        "value_cache": cache.to(device).clone(),
        "query_norm": None,
        "key_norm": None,
        "eps": EPS,
    }


def copied(arguments: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def test_reference_agrees_with_transformers(randn) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    tokens, heads, kv_heads, size = 5, 4, 2, 64
    arguments = make(randn, tokens, heads, kv_heads, size, size, torch.float32)
    norms = {}
    for name in ("query_norm", "key_norm"):
        norms[name] = Qwen3RMSNorm(size, eps=EPS).to(arguments["qkv"].device)
        norms[name].weight.data.copy_(randn(size))
        arguments[name] = norms[name].weight.data
    found = reference(**arguments)

    states = arguments["qkv"].view(1, tokens, -1, size)
    query, key, value = states.split([heads, kv_heads, kv_heads], dim=2)
    cos, sin = (each[arguments["positions"].cpu()].repeat(1, 2)[None] for each in angles(50, size))
    query, key = apply_rotary_pos_emb(
        norms["query_norm"](query), norms["key_norm"](key), cos.to(query), sin.to(query),
        unsqueeze_dim=2,
    )  # fmt: skip
    torch.testing.assert_close(found, query[0])
    live = slice(0, tokens - 2)
    slots = arguments["slot_mapping"][live]
    for cache, expected in ((arguments["key_cache"], key), (arguments["value_cache"], value)):
        torch.testing.assert_close(cache.flatten(0, 1)[slots], expected[0, live])


def test_a_table_that_rotates_nothing(implementation, randn) -> None:
    """That of layers without positions: queries and keys go through bit by bit."""
    for function in (reference, implementation(rotary_cache, "triton")):
        arguments = make(randn, 5, 4, 2, 64, 64, torch.float32)
        arguments["cos_sin"] = identity_table(50, arguments["qkv"].device)
        query, key, _ = arguments["qkv"].view(5, 8, 64).split([4, 2, 2], dim=1)
        assert torch.equal(function(**arguments), query)
        slots = arguments["slot_mapping"][:3]
        assert torch.equal(arguments["key_cache"].flatten(0, 1)[slots], key[:3])


def test_reference_rotates_only_the_first_channels(randn) -> None:
    arguments = make(randn, 4, 2, 1, 64, 16, torch.float32)
    found = reference(**arguments)
    query = arguments["qkv"].view(4, 4, 64)[:, :2]
    assert torch.equal(found[..., 16:], query[..., 16:])
    cos, sin = (each[arguments["positions"].cpu()].to(query.device) for each in angles(50, 16))
    pairs = torch.view_as_complex(torch.stack((query[..., :8], query[..., 8:16]), dim=-1))
    turned = pairs * torch.complex(cos, sin).unsqueeze(1)
    torch.testing.assert_close(found[..., :16], torch.cat((turned.real, turned.imag), dim=-1))


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_size", "rotary", "query_norm", "key_norm"),
    [
        (1, 2, 2, 64, 64, False, False),
        (3, 8, 1, 96, 96, True, True),
        (17, 8, 2, 128, 128, True, True),
        (3, 7, 1, 256, 64, False, True),
        (4, 3, 3, 64, 24, True, False),
        (5, 4, 2, 64, 2, False, False),
        (0, 2, 1, 64, 64, False, False),
    ],
)
@pytest.mark.parametrize("name", ["triton", "torch", "cpp"])
def test_implementation(
    implementation, dtypes, randn, name, tokens, heads, kv_heads, head_size, rotary, query_norm,
    key_norm,
) -> None:  # fmt: skip
    function = implementation(rotary_cache, name)
    if name == "cpp":
        dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        arguments = make(randn, tokens, heads, kv_heads, head_size, rotary, dtype)
        if query_norm:
            arguments["query_norm"] = randn(head_size, dtype=dtype)
        if key_norm:
            arguments["key_norm"] = randn(head_size, dtype=dtype)
        expected_arguments = copied(arguments)
        expected = reference(**expected_arguments)
        found = function(**arguments)
        assert found.is_contiguous()
        # A rotation adds two products: what one rounding step moved may cancel.
        step = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=step, atol=step)
        # Padding rows race for their slot in the null block; all others must be exact, and the
        # slots of no token unwritten.
        for name in ("key_cache", "value_cache"):
            torch.testing.assert_close(
                arguments[name][1:], expected_arguments[name][1:], rtol=step, atol=step,
                equal_nan=True,
            )  # fmt: skip
        assert torch.equal(
            arguments["value_cache"][1:].nan_to_num(7.0),
            expected_arguments["value_cache"][1:].nan_to_num(7.0),
        )
        for name in ("qkv", "positions", "cos_sin", "slot_mapping"):
            assert torch.equal(arguments[name], expected_arguments[name])


@pytest.mark.parametrize("fixed", [None, (0.0, 0.0), (0.03, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize(("head_size", "rotary"), [(64, 64), (96, 24)])
def test_codes(implementation, platform, own_kernels, randn, head_size, rotary, fixed) -> None:
    """Of what a cache of numbers would hold, bit by bit; of the others, no slot is written. Where a
    compiler may fuse a product and a sum, in one kernel and not in the other, bit by bit up to
    that."""
    fp8 = platform.fp8_dtype
    if fp8 is None:
        pytest.skip("the device has no eight-bit floating-point numbers")
    for function in (reference, implementation(rotary_cache, "triton")):
        plain = make(randn, 9, 4, 2, head_size, rotary, torch.float32)
        plain["key_norm"] = randn(head_size)
        # Rows of all magnitudes, one of them zeros.
        plain["qkv"] *= torch.logspace(-3, 3, 9).unsqueeze(1).to(plain["qkv"])
        plain["qkv"][3] = 0
        coded = copied(plain)
        for name in ("key", "value"):
            cache = coded[f"{name}_cache"]
            coded[f"{name}_cache"] = cache.to(fp8)
            coded[f"{name}_scales"] = cache[..., 0].transpose(1, 2).contiguous()
        if fixed is not None:
            coded["fixed_scales"] = torch.tensor(fixed, device=platform.device)
        assert torch.equal(function(**coded), function(**plain))
        slots = plain["slot_mapping"][:-2]
        for number, name in enumerate(("key", "value")):
            rows = plain[f"{name}_cache"].flatten(0, 1)[slots]
            scale = None if fixed is None else coded["fixed_scales"][number]
            codes, scales = quantise(rows, fp8, scale)
            found = coded[f"{name}_scales"].transpose(1, 2).flatten(0, 1)
            written = coded[f"{name}_cache"].flatten(0, 1)[slots]
            if not own_kernels or function is reference:
                assert torch.equal(found[slots], scales)
                assert torch.equal(written.view(torch.uint8), codes.view(torch.uint8))
            else:
                torch.testing.assert_close(found[slots], scales, rtol=5e-7, atol=0)
                torch.testing.assert_close(written.float(), codes.float(), rtol=0.13, atol=0.002)
                differ = written.view(torch.uint8) != codes.view(torch.uint8)
                assert float(differ.float().mean()) < 0.002
            others = torch.ones(len(found), dtype=torch.bool).index_fill(0, slots.cpu(), False)
            others[0] = False  # padding's
            assert found[others.to(found.device)].isnan().all()


@pytest.mark.parametrize("layout", ["keys beside values", "heads before slots"])
def test_triton_writes_into_views_of_a_larger_cache(implementation, randn, layout) -> None:
    triton = implementation(rotary_cache, "triton")
    arguments = make(randn, 5, 4, 2, 64, 64, torch.float32)
    expected_arguments = copied(arguments)
    expected = reference(**expected_arguments)
    shape = arguments["key_cache"].shape
    if layout == "keys beside values":
        whole = arguments["qkv"].new_full((shape[0], 2, *shape[1:]), torch.nan)
        arguments["key_cache"], arguments["value_cache"] = whole.unbind(1)
    else:
        whole = arguments["qkv"].new_full((2, shape[0], shape[2], shape[1], shape[3]), torch.nan)
        arguments["key_cache"], arguments["value_cache"] = whole.transpose(2, 3).unbind(0)
    torch.testing.assert_close(triton(**arguments), expected)
    for name in ("key_cache", "value_cache"):
        torch.testing.assert_close(
            arguments[name][1:], expected_arguments[name][1:], equal_nan=True
        )


def test_triton_reads_strided_rows(implementation, randn) -> None:
    triton = implementation(rotary_cache, "triton")
    arguments = make(randn, 3, 2, 1, 64, 64, torch.float32)
    expected = reference(**copied(arguments))
    wide = randn(3, arguments["qkv"].shape[1] + 32)
    wide[:, :-32] = arguments["qkv"]
    arguments["qkv"] = wide[:, :-32]
    torch.testing.assert_close(triton(**arguments), expected)
