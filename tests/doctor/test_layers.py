"""``doctor conformance --model``: a model's ops against their references, layer by layer."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from reprise import LLM
from reprise.doctor.conformance.layers import compare_with_references, small_engine
from reprise.loading.checkpoint import DEMO_MODEL


@pytest.fixture
def runner(device):
    return LLM(**small_engine({"model": str(DEMO_MODEL), "device": device})).engine.runner


def test_every_call_is_compared_and_agrees(runner):
    report = compare_with_references(runner, {})
    assert report.wrong == []
    assert report.agreeing == report.rows == 4 + 24
    in_layers = [each for each in report.calls if each.layer is not None]
    layers = len(runner.model.caches())
    assert {each.layer for each in in_layers} == set(range(layers))
    # Six ops a layer, in each of two steps.
    assert len(in_layers) == 2 * 6 * layers
    for each in report.calls:
        assert each.drift < 1e-2
        if each.implementation == "reference":
            assert each.difference == each.allowed == 0
    if any(each.name != "reference" for each in runner.ops.chosen.values()):
        assert max(each.difference for each in report.calls) > 0


def scaled(result, args):
    return result * 1.01


def with_a_nan(result, args):
    return result.masked_fill(result > 1, torch.nan)


def scaled_residual(result, args):
    args[3].mul_(1.05)


@pytest.mark.parametrize(
    ("op", "harm", "layer"),
    [
        ("norm_linear", scaled, 2),
        ("norm_linear", with_a_nan, 2),
        ("linear_add", scaled_residual, 1),
    ],
)
def test_a_wrong_call_is_named_with_its_layer_and_no_other_is(runner, op, harm, layer):
    original, calls = runner.ops.functions[op], itertools.count()
    in_a_step = {"norm_linear": 1, "linear_add": 2}[op] * len(runner.model.caches())

    def spoiled(*args, **kwargs):
        result = original(*args, **kwargs)
        return harm(result, args) if next(calls) % in_a_step == 2 else result

    runner.ops.functions[op] = spoiled
    report = compare_with_references(runner, {})
    assert [(each.step[:6], each.op, each.index, each.layer) for each in report.wrong] == [
        (step, op, 2, layer) for step in ("decode", "mixed[")
    ]
    assert f"{op} #2" in str(report.wrong[0])
    assert f"layers.{layer}" in str(report.wrong[0])
    if harm is with_a_nan:
        assert all(each.difference == torch.inf for each in report.wrong)
        return
    # What gathers begins there.
    first = report.calls.index(report.wrong[0])
    decode = [each for each in report.calls if each.step.startswith("decode")]
    before = max(each.drift for each in decode[:first])
    assert decode[first].drift > 1e-3
    assert decode[-1].drift > 10 * before


def test_references_alone_leave_nothing_to_compare(device):
    table = dict.fromkeys(("norm_linear", "paged_attention"), "reference")
    options = {"model": str(DEMO_MODEL), "device": device, "ops": table}
    report = compare_with_references(LLM(**small_engine(options)).engine.runner, {})
    for each in report.calls:
        assert each.implementation == "reference" or each.op not in table


def test_the_command(invoke, device):
    done = invoke("doctor", "conformance", "--model", str(DEMO_MODEL), "--device", device, "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["conforms"]
    assert report["agreeing_rows"] == report["rows"] == 28
    assert {"op", "module", "layer", "difference", "drift"} <= set(report["calls"][0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dtype", "bfloat16"], "--dtype=bfloat16: only with --model"),
        (
            ["--model", str(DEMO_MODEL), "--only", "op_*"],
            "--only, --explain and --time-limit are about contracts",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(invoke, arguments, told):
    done = invoke("doctor", "conformance", *arguments)
    assert done.exit_code == 2
    assert told in done.stderr
