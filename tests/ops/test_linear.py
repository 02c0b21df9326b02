from __future__ import annotations

import pytest
import torch

from reprise.ops import (
    gated_linear,
    linear,
    linear_add,
    linear_into,
    norm_gated_linear,
    norm_linear,
)


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


def test_large_weights_go_to_onednn(implementation, randn) -> None:
    """Few rows of float32; what the cases hold is too small for it."""
    function = implementation(linear, "onednn")
    weight, bias = randn(512, 512) / 512**0.5, randn(512)
    for rows in (1, 9, 64, 65):
        x = randn(rows, 512)
        with torch.profiler.profile() as seen:
            found = function(x, weight, bias)
        names = {each.name for each in seen.events()}
        assert ("mkldnn::_linear_pointwise" in names) is (rows <= 64)
        expected = x.double() @ weight.double().T + bias.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
        assert function(x, weight[:511], bias[:511]).is_contiguous()


@pytest.mark.parametrize("shape", [(512, 512), (512, 511), (40, 96), (1, 1)])
def test_bfloat16_is_as_exact_as_its_rounding(implementation, randn, shape) -> None:
    """However many rows: each number is within a rounding of the true product, as torch's own."""
    outputs, inputs = shape
    weight = (randn(outputs, inputs) / inputs**0.5).bfloat16()
    bias = randn(outputs).bfloat16()
    for name in ("onednn", "cpp", "reference"):
        function = implementation(linear, name)
        for rows in (0, 1, 2, 9, 64, 65):
            x = randn(rows, inputs).bfloat16()
            for each in (None, bias):
                found = function(x, weight, each)
                assert (found.shape, found.dtype) == ((rows, outputs), torch.bfloat16)
                assert found.is_contiguous()
                expected = x.double() @ weight.double().T + (0 if each is None else each.double())
                torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)
            into = torch.zeros(rows, outputs, dtype=torch.bfloat16)
            implementation(linear_into, name)(x, weight, into)
            implementation(linear_add, name)(x, weight, None, into)
            torch.testing.assert_close(into.double(), 2 * (expected - bias), rtol=2**-7, atol=2e-3)


def test_few_rows_of_bfloat16_leave_the_weight_as_it_lies(implementation, randn) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no instructions for it")
    function = implementation(linear, "onednn")
    weight = randn(512, 512).bfloat16()
    called = {1: "aten::mv", 2: "aten::mm", 64: "aten::mm", 65: "aten::linear"}
    for rows, name in called.items():
        x = randn(rows, 512).bfloat16()
        with torch.profiler.profile() as seen:
            function(x, weight, None)
        names = {each.name for each in seen.events()}
        assert name in names
        assert ("aten::linear" in names) is (rows > 64)


# One row in a narrow type has a kernel of its own: sizes below a tile, odd ones, several tiles.
# So have a few rows with whole steps of 128 inputs, of which programs may share a tile.
SIZES = [
    (1, 1), (3, 40), (7, 100), (5, 4100), (16, 64), (9, 128), (40, 256), (32, 512), (130, 256),
]  # fmt: skip


ROWS = [(1, False), (1, True), (2, True), (100, False), (2, False), (100, True)]
"""And whether there is a bias."""
OPS = [linear, norm_linear, norm_gated_linear, linear_add, gated_linear]


def in_short_runs(op: int, size: int, rows: int) -> bool:
    """Every two of them, and each op with each size twice."""
    return rows < 4 and (op + size + rows) % 2 == 0


@pytest.mark.parametrize(
    ("op", "features", "inputs", "rows", "with_bias"),
    [
        pytest.param(
            op, *size, *rows, id=f"{op.name}-{size[0]}-{size[1]}-{rows[0]}-{rows[1]}",
            marks=[pytest.mark.long] * (not in_short_runs(i, j, k)),
        )
        for i, op in enumerate(OPS) for j, size in enumerate(SIZES) for k, rows in enumerate(ROWS)
    ],
)  # fmt: skip
def test_triton(implementation, dtypes, randn, op, features, inputs, rows, with_bias) -> None:
    triton, reference = implementation(op, "triton"), implementation(op, "reference")
    for dtype in dtypes:
        outputs = 2 * features if op in (gated_linear, norm_gated_linear) else features
        weight = (randn(outputs, inputs) / inputs**0.5).to(dtype)
        named = {
            "x": randn(rows, inputs, dtype=dtype),
            "weight": weight,
            "bias": randn(outputs, dtype=dtype) if with_bias else None,
        }
        if op in (norm_linear, norm_gated_linear):
            named |= {"norm_weight": randn(inputs, dtype=dtype), "eps": 1e-6}
        residual = randn(rows, features, dtype=dtype)
        found = called(triton, op, named, residual)
        expected = called(reference, op, named, residual)
        assert found.dtype == dtype
        assert found.is_contiguous()
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_what_the_kernels_of_several_rows_take(implementation, randn) -> None:
    implementation(norm_gated_linear, "triton")
    from reprise.ops.linear.few_rows_kernel import supports_few_rows, takes_norm
    from reprise.ops.linear.small_weight_kernel import supports_small_weight

    x, weight = randn(2, 256, dtype=torch.float16), randn(80, 256, dtype=torch.float16)
    odd = x[:, :200], weight[:, :200].contiguous()
    assert supports_few_rows(x, weight)
    assert not takes_norm(x, weight)  # x times the gain might exceed its range
    assert takes_norm(x.bfloat16(), weight.bfloat16())
    assert not supports_few_rows(x[:1], weight)
    assert not supports_few_rows(x.float(), weight.float())
    assert not supports_few_rows(*odd)
    many = x.repeat(33, 1)
    for gated in (False, True):
        assert not supports_few_rows(many, weight)
        assert supports_small_weight(many, weight[:32], gated)
        assert not supports_small_weight(many.float(), weight[:32].float(), gated)
        assert not supports_small_weight(odd[0], odd[1][:32], gated)


def test_what_the_kernel_of_two_rows_takes(implementation, randn) -> None:
    implementation(linear, "triton")
    from reprise.ops.linear.two_rows_kernel import supports_two_rows

    x, weight = randn(2, 256, dtype=torch.float16), randn(80, 256, dtype=torch.float16)
    assert supports_two_rows(x, weight)
    assert not supports_two_rows(x[:1], weight)
    assert not supports_two_rows(x.repeat(2, 1), weight)
    assert not supports_two_rows(x.float(), weight.float())
    assert not supports_two_rows(x[:, :100], weight[:, :100].contiguous())
    assert not supports_two_rows(x, weight[:1].expand(1 << 16, 256))


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("kind", ["plain", "bias", "norm", "gated", "norm and gated", "add"])
def test_few_rows(implementation, randn, monkeypatch, rows, kind) -> None:
    """Each configuration of the kernel, with strided rows of x, several steps and programs that
    share a tile, and features that do not fill it."""
    implementation(linear, "triton")
    from reprise.ops.linear import few_rows_kernel

    for limit in ("_MANY_WEIGHTS", "_LEAST_PROGRAMS"):
        monkeypatch.setattr(few_rows_kernel, limit, 0)
    few_rows_kernel.config_of.cache_clear()
    dtype = torch.float16
    # With as many features there are more tiles than two for each multiprocessor.
    gated, features, inputs = "gated" in kind, 300 if rows == 64 else 75, 1024
    x = randn(rows, inputs + 32, dtype=dtype)[:, 16:-16]
    weight = (randn(features * (1 + gated), inputs) / inputs**0.5).to(dtype)
    bias = randn(len(weight), dtype=dtype) if kind in ("bias", "norm and gated") else None
    if few_rows_kernel.config_of(rows, *weight.shape, x.device).late:
        norm = randn(inputs, dtype=dtype) if "norm" in kind else None
    else:
        norm = None
    out = randn(rows, features, dtype=dtype)
    expected = x.float()
    if norm is not None:
        expected = torch.nn.functional.rms_norm(expected, (inputs,), norm.float(), 1e-6)
    expected = expected @ weight.float().T
    if bias is not None:
        expected = expected + bias.float()
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * up
    if kind == "add":
        expected = expected + out.float()
    few_rows_kernel.launch_few_rows(
        x, weight, bias, out, norm, 1e-6, add=kind == "add", gated=gated
    )
    torch.testing.assert_close(out.float(), expected, rtol=4e-3, atol=4e-3)
    few_rows_kernel.config_of.cache_clear()


@pytest.mark.covering(1)
@pytest.mark.parametrize("rows", [4, 8, 9, 16, 17, 31, 33, 64, 65, 128, 129, 130])
@pytest.mark.parametrize("inputs", [200, 256])
def test_numbers_of_rows(implementation, randn, inputs, rows) -> None:
    """Where one kernel ends and another begins."""
    triton, reference = (
        implementation(linear_add, "triton"),
        linear_add.implementations["reference"],
    )
    x = randn(rows, 3 * inputs, dtype=torch.float16)[:, inputs : 2 * inputs]
    weight = (randn(13, inputs) / inputs**0.5).half()
    found = randn(rows, 13, dtype=torch.float16)
    expected = found.clone()
    triton(x, weight, None, found)
    reference.function(x, weight, None, expected)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3)


def called(function, op, named, residual):
    if op is not linear_add:
        return function(**named)
    added = residual.clone()
    assert function(**named, residual=added) is None
    return added


def test_the_fused_ops_are_their_parts(implementation, randn) -> None:
    x, gain, weight, bias = randn(3, 32), randn(32), randn(10, 32), randn(10)
    scale = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    product = (x.double() * scale * gain.double()) @ weight.double().T + bias.double()
    gate, up = product.chunk(2, dim=-1)
    for name in norm_linear.implementations:
        found = implementation(norm_linear, name)(x, gain, 1e-6, weight, bias)
        torch.testing.assert_close(found.double(), product, rtol=1e-5, atol=2e-5)
        found = implementation(norm_gated_linear, name)(x, gain, 1e-6, weight, bias)
        expected = gate * gate.sigmoid() * up
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", list(linear_into.implementations))
def test_a_product_into_rows_of_a_larger_tensor(implementation, randn, name) -> None:
    x, weight, wide = randn(3, 32), randn(7, 32), randn(5, 7)
    behind = wide[3:].clone()
    assert implementation(linear_into, name)(x, weight, wide[:3]) is None
    torch.testing.assert_close(wide[:3], x @ weight.T, rtol=1e-5, atol=2e-5)
    assert torch.equal(wide[3:], behind)
