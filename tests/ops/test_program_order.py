"""What a kernel gives must not depend on which of its programs, or of its warps, comes first.

The interpreter runs programs one after the other and knows no warps: here the last program comes
first, and kernels that write over what they read are named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reprise.ops import all_ops
from reprise.ops.cases import Maker
from reprise.ops.compressor.cases import arguments as compressor_arguments
from reprise.platforms import Platform

OPS = [
    "compressor",
    "hyper_connection",
    *(pytest.param(each, marks=pytest.mark.long) for each in ("indexer", "sparse_attention")),
]
OVERWRITING = {
    "apply_penalties_kernel": "each number by itself",
    "conv_one_token_kernel": "each channel by itself",
    "conv_state_kernel": "barrier",
    "lay_out_kernel": "each token by itself",
    "advance_kernel": "each request by itself",
    "down_kernel": "each number by itself",
    "combine_kernel": "each number by itself",
    "one_row_kernel": "each number by itself",
    "fp8_product_kernel": "each number by itself",
    "w4_row_kernel": "each number by itself",
    "w4_few_rows_kernel": "each number by itself",
    "w4_arranged_kernel": "each number by itself",
    "delta_tokens_kernel": "no thread has an element of the state that another has",
    "delta_scan_kernel": "no thread has an element of the state that another has",
    "stream_mix_kernel": "barrier",
}
"""Kernels of which a program writes where it has read, and why no warp reads too late: what becomes
of an element goes back to where it was alone, or all warps meet in between."""
SCRIPT = """
import json, sys, torch
from triton.runtime import interpreter
from reprise.ops import OpTable, all_ops
from reprise.ops.cases import Maker
from reprise.platforms import resolve

builder, read, here, found = interpreter.InterpreterBuilder, set(), [None], set()
load, store = builder.create_masked_load, builder.create_masked_store
call = interpreter.GridExecutor.__call__

def addresses(pointers, mask):
    place = (here[0][0], interpreter.interpreter_builder.grid_idx)
    if here[0][1] != place:
        here[0][1] = place
        read.clear()
    return pointers.data[mask.data].ravel().tolist()

def loaded(self, pointers, mask, *rest):
    read.update(addresses(pointers, mask))
    return load(self, pointers, mask, *rest)

def stored(self, pointers, value, mask, *rest):
    if not read.isdisjoint(addresses(pointers, mask)):
        found.add(here[0][0])
    return store(self, pointers, value, mask, *rest)

def launched(self, *args, **options):
    here[0] = [self.fn.__name__, None]
    return call(self, *args, **options)

builder.create_masked_load, builder.create_masked_store = loaded, stored
interpreter.GridExecutor.__call__ = launched
with OpTable(resolve("cpu")).activate():
    for op in all_ops().values():
        triton = op.implementations.get("triton")
        cases = op.cases.small(Maker(torch.device("cpu"), torch.float32)) if triton else ()
        for each in cases:
            if triton.refusal(**each) is None:
                triton.function(**each)
print(json.dumps(sorted(found)))
"""


@pytest.fixture
def backwards(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program comes first."""
    if platform.device_type != "cpu":
        pytest.skip("a device has an order of its own")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def turned(x: int, y: int, z: int) -> None:
        last = builder.grid_dim
        place(last[0] - 1 - x, last[1] - 1 - y, last[2] - 1 - z)

    monkeypatch.setattr(builder, "set_grid_idx", turned)


@pytest.mark.parametrize("name", OPS)
def test_programs_in_the_other_order(backwards, implementation, name) -> None:
    op = all_ops()[name]
    cases = [op.cases.small(Maker(torch.device("cpu"), torch.float32))[:1] for _ in range(2)]
    for ours, theirs in zip(*cases, strict=True):
        found = implementation(op, "triton")(**ours)
        expected = op.implementations["reference"].function(**theirs)
        pairs = [(ours[each], theirs[each]) for each in op.written(ours)]
        for one, other in [*pairs, *([] if expected is None else [(found, expected)])]:
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_padding_shares_a_slot_of_nobody(backwards, implementation) -> None:
    """Whichever token is the last to write it: what belongs to somebody is the same."""
    ours, theirs = (
        compressor_arguments(
            Maker(torch.device("cpu"), torch.float32), [5, 8], [1, 4], 4, 16, 8,
            overlap=True, blocks=(8, 8), padding=3,
        )
        for _ in range(2)
    )  # fmt: skip
    op = all_ops()["compressor"]
    implementation(op, "triton")(**ours)
    op.implementations["reference"].function(**theirs)
    assert not torch.equal(ours["state"][0], theirs["state"][0])
    assert torch.equal(ours["state"][1:], theirs["state"][1:])
    torch.testing.assert_close(ours["cache"][1:], theirs["cache"][1:], rtol=2e-5, atol=2e-5)


@pytest.mark.long
def test_who_writes_over_what_it_reads_is_known(device: str) -> None:
    """A new kernel that does has to say here why none of its warps reads too late."""
    pytest.importorskip("triton")
    if device != "cpu":
        pytest.skip("the interpreter runs on the host")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) <= OVERWRITING.keys(), sorted(set(found) - OVERWRITING.keys())
    sources = Path(__file__).parents[2] / "src" / "reprise" / "ops"
    for kernel in [name for name, why in OVERWRITING.items() if why == "barrier"]:
        assert any(barrier_in(each.read_text(), kernel) for each in sources.rglob("*.py")), kernel


def barrier_in(source: str, kernel: str) -> bool:
    _, _, rest = source.partition(f"def {kernel}(")
    return "tl.debug_barrier()" in rest.partition("\n@triton.jit")[0]
