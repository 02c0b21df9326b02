"""Wrong products are caught by the kit, and named by the doctor with the layers that have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import TinyModels
from quantized import quantized

from reprise import LLM
from reprise.doctor.conformance.contract import Broken, Kit
from reprise.doctor.conformance.layers import compare_with_references, small_engine
from reprise.doctor.conformance.operations import matches_reference
from reprise.ops import all_ops
from reprise.platforms import Platform
from reprise.testing.faults.products import WRONG_PRODUCTS, WrongProduct, wrongly

CASES = [
    pytest.param(op, fault, id=f"{op}, {fault.__name__}")
    for op, faults in WRONG_PRODUCTS.items()
    for fault in faults
]


@contextmanager
def with_fault(op: str, fault: WrongProduct) -> Iterator[None]:
    """The op has its reference and an implementation ``wrong`` within the ``with`` block."""
    declared = all_ops()[op]
    kept = declared.implementations
    declared.implementations = {"reference": kept["reference"]}
    declared.implementation("wrong", wrongly(declared, fault))
    try:
        yield
    finally:
        declared.implementations = kept


@pytest.mark.parametrize(("op", "fault"), CASES)
def test_the_kit_catches_it(platform: Platform, device: str, op: str, fault: WrongProduct) -> None:
    kit = Kit(platform, device)
    with with_fault(op, fault), pytest.raises(Broken, match=r"wrong, torch\.float32, case"):
        matches_reference(kit, all_ops()[op])
    with with_fault(op, lambda compute, named: compute(**named)):
        assert "wrong" in matches_reference(kit, all_ops()[op])


CALLED = [each for each in CASES if each.values[0] not in ("fp8_linear", "w4_linear")]
"""Those of the ops that a decoder calls."""


@pytest.mark.parametrize(("op", "fault"), CALLED)
def test_the_doctor_names_the_calls(
    tiny: TinyModels, device: str, op: str, fault: WrongProduct
) -> None:
    model = quantized(
        tiny("llama", intermediate_size=256, head_dim=64),
        "fp8" if op.startswith("fp8") else "int4-asymmetric",
    )
    options = {
        "model": str(model.path), "device": device, "dtype": "float32", "ops": {op: "wrong"},
    }  # fmt: skip
    with with_fault(op, fault):
        report = compare_with_references(LLM(**small_engine(options)).engine.runner, {})
    assert {each.op for each in report.wrong} == {op}
    assert {each.layer for each in report.wrong} == {0, 1}
    with with_fault(op, lambda compute, named: compute(**named)):
        report = compare_with_references(LLM(**small_engine(options)).engine.runner, {})
    assert report.wrong == []
