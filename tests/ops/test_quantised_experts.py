"""Triton kernels of experts of eight and of four bits against their references."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from reprise import ops
from reprise.ops import OpTable
from reprise.ops.cases import Maker
from reprise.ops.mxfp4_experts.reference import dequantise

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@pytest.fixture(params=[ops.fp8_experts, ops.mxfp4_experts], ids=lambda op: op.name)
def op(request):
    return request.param


@pytest.fixture
def kernel(op, implementation):
    return implementation(op, "triton")


def taken(op, platform, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The small cases that the kernel computes."""
    every = op.cases.small(Maker(platform.device, dtype))
    return [each for each in every if op.implementations["triton"].refusal(**each) is None]


def agree(op, kernel, arguments: dict[str, Any]) -> Tensor:
    found = kernel(**arguments)
    expected = op.implementations["reference"].function(**arguments)
    assert found.dtype is expected.dtype
    allowed = TOLERANCE[found.dtype] * max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected.double()).abs().max()) <= allowed
    return found


def routed(arguments: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The same experts with other rows, sent to these."""
    x, device = arguments["x"], arguments["x"].device
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(ids), x.shape[1], generator=generator)
    shares = torch.rand(ids.shape, generator=generator)
    return {
        **arguments,
        "x": rows.to(device, x.dtype),
        "weights": shares.to(device),
        "ids": ids.to(device, torch.int32),
    }


def test_small_cases(op, kernel, platform, dtypes, pytestconfig) -> None:
    """All of them in every type, in short runs in one."""
    long = platform.device_type != "cpu" or pytestconfig.getoption("--long")
    for dtype in dtypes if long else dtypes[:1]:
        cases = taken(op, platform, dtype)
        assert cases
        for each in cases:
            agree(op, kernel, each)


def test_it_says_what_it_does_not_compute(platform) -> None:
    """Products whose inputs are no multiple of a step."""
    every = ops.fp8_experts.cases.small(Maker(platform.device, torch.float32))
    triton = ops.fp8_experts.implementations["triton"]
    assert {triton.refusal(**each) is None for each in every if each["x"].shape[1] % 128} == {False}


@pytest.mark.parametrize("rows", [2, 40])
def test_all_rows_go_to_one_expert_and_others_have_none(op, kernel, platform, rows) -> None:
    (first, *_) = taken(op, platform, torch.float32)
    last = len(first["gate_up"]) - 1
    agree(op, kernel, routed(first, torch.tensor([[last, -1]] * rows)))


def test_nobody_is_sent_anywhere(op, kernel, platform) -> None:
    (first, *_) = taken(op, platform, torch.float32)
    nobody = torch.tensor([[-1, len(first["gate_up"])]] * 3)
    assert not agree(op, kernel, routed(first, nobody)).count_nonzero()


def test_what_padding_holds_is_nobodys(op, kernel, platform) -> None:
    """Rows and shares of padding are no numbers, and so are experts that no row is sent to."""
    (first, *_) = taken(op, platform, torch.float32)
    ids = torch.tensor([[1, 2], [-1, -1], [2, 1], [-1, 1], [-1, -1]])
    whole = routed(first, ids)
    expected = kernel(**whole)
    four = whole["gate_up"].dtype is torch.int8
    for name in ("gate_up", "down"):
        name, none = (f"{name}_scale", 0xFF) if four else (name, 0x7F)
        whole[name] = whole[name].clone()
        bits = whole[name].view(torch.uint8)
        bits[0], bits[3:] = none, none
    for name in ("x", "weights"):
        whole[name] = whole[name].clone()
        whole[name][[1, 4]] = torch.nan
    whole["weights"][3, 0] = torch.nan
    assert torch.equal(kernel(**whole), expected)


def test_tiles_of_every_size(op, kernel, platform, monkeypatch, pytestconfig) -> None:
    """As many rows of an expert as choose them on a device are too many for the interpreter."""
    module = sys.modules[kernel.__module__]
    configs = [each for _, each in module._BY_ROWS[1:]]
    if pytestconfig.getoption("--long"):
        configs.append(module._MANY)
    (first, *_) = taken(op, platform, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, len(first["gate_up"]) + 1, (9, 2), generator=generator)
    arguments = routed(first, ids)
    for config in configs:
        monkeypatch.setattr(module, "config_for", lambda *sizes, c=config: c)
        agree(op, kernel, arguments)


@pytest.fixture
def four_bits(implementation):
    return implementation(ops.mxfp4_experts, "triton")


@pytest.mark.parametrize(
    ("config", "together", "features", "inputs"),
    [
        ((8, 16, 256, 3, 2), 1, 24, 96),
        ((16, 32, 128, 3, 2), 2, 24, 96),  # which is no multiple of so many steps
        ((64, 16, 128, 2, 2), 2, 32, 256),
    ],
)
def test_every_number_of_four_bits_with_every_power(
    four_bits, platform, config, together, features, inputs
) -> None:
    """To the bit, in the kernel that few rows have in bfloat16: each is one of the inputs alone."""
    from reprise.ops.experts.grouped_kernel import Config
    from reprise.ops.experts.groups import sort_by_expert
    from reprise.ops.mxfp4_experts.few_rows_kernel import launch_few_rows

    device = platform.device
    codes = torch.arange(features * inputs // 2).view(features, -1) * 37 % 256
    codes = torch.stack((codes, 255 - codes)).to(device, torch.uint8).view(torch.int8)
    # From 2 ** -93 to 2 ** 33.
    powers = torch.arange(2 * features * inputs // 32).view(2, features, -1) * 11 % 127 + 34
    powers = powers.to(device, torch.uint8)
    x = torch.eye(inputs, device=device, dtype=torch.bfloat16)
    ids = (torch.arange(inputs, device=device, dtype=torch.int32) % 2).view(-1, 1)
    out = x.new_empty(inputs, features)
    with OpTable(platform).activate():
        sizes = Config(*config, swap=True, together=together)
        groups = sort_by_expert(ids, 2, sizes.block_m)
        # The second product reads its rows in the order of groups.
        rows = x[torch.argsort(ids.view(-1), stable=True)].contiguous()
        launch_few_rows(rows, codes, powers, groups, out, sizes, top=1, gated=False)
    weight = dequantise(codes, powers)
    expected = weight[ids.view(-1).long(), :, torch.arange(inputs, device=device)]
    wrong = out.float() != expected
    assert not wrong.any(), (out.float()[wrong], expected[wrong])


def test_a_power_that_is_no_number_is_not_taken_for_one(four_bits, platform) -> None:
    """255, and what bfloat16 has no room for."""
    make = Maker(platform.device, torch.bfloat16)
    for scale in (255, 200):
        arguments = dict(ops.mxfp4_experts.cases.small(make)[0])
        arguments["gate_up_scale"] = torch.full_like(arguments["gate_up_scale"], scale)
        assert not four_bits(**arguments).isfinite().any()
