"""The kit sees bits that depend on other rows, whatever decides about them."""

from __future__ import annotations

import pytest

from reprise import platforms
from reprise.doctor import conformance as kit
from reprise.ops import all_ops
from reprise.ops.implementation import Implementation
from reprise.testing.faults.rows import WRONG_ROWS, depending

PROMISING = [
    name
    for name, op in all_ops().items()
    if op.rows and "invariant" in op.implementations
]  # fmt: skip


@pytest.fixture(scope="module")
def on_cpu():
    found = kit.Kit(platforms.resolve("cpu"), "cpu")
    assert found.ops  # made before a test takes implementations away
    return found


def check(on_cpu, name):
    return kit.CONTRACTS[f"op_is_batch_invariant:{name}"].check(on_cpu)


@pytest.mark.parametrize("fault", WRONG_ROWS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", PROMISING)
def test_a_broken_promise_is_found(on_cpu, name, fault, monkeypatch):
    op = all_ops()[name]
    broken = Implementation(
        name, "broken", depending(op, "invariant", fault), batch_invariant=True,
        accepts=op.implementations["invariant"].accepts,
    )  # fmt: skip
    monkeypatch.setattr(op, "implementations", {"broken": broken})
    with pytest.raises(kit.Broken, match=r"broken, torch.float32, case \d+: .* has other bits"):
        check(on_cpu, name)


def test_what_promises_nothing_is_not_tried(on_cpu):
    with pytest.raises(kit.Skipped, match="no implementation promises it here"):
        check(on_cpu, "sparse_attention")
