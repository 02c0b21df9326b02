"""Sums over the ranks of a group, alone, and with the residual stream and its norm behind them."""

from typing import Any

from torch import Tensor

from reprise.distributed import reached
from reprise.ops.all_reduce.cases import add_cases, add_norm_cases, cases
from reprise.ops.all_reduce.reference import all_reduce as _all_reduce
from reprise.ops.all_reduce.reference import all_reduce_add as _all_reduce_add
from reprise.ops.all_reduce.reference import all_reduce_add_norm as _all_reduce_add_norm
from reprise.ops.all_reduce.reference import fake_all_reduce_add_norm
from reprise.ops.registry import needs_triton, op
from reprise.ops.rms_norm.accepts import sums_alone
from reprise.ops.step import needs_host_memory

all_reduce = op(
    "all_reduce", _all_reduce, cases=cases, mutates=("x",), rows=("x",), collective=True
)
all_reduce_add = op(
    "all_reduce_add",
    _all_reduce_add,
    cases=add_cases,
    mutates=("partial", "residual"),
    rows=("partial", "residual"),
    collective=True,
)
all_reduce_add_norm = op(
    "all_reduce_add_norm",
    _all_reduce_add_norm,
    cases=add_norm_cases,
    mutates=("partial", "residual"),
    rows=("partial", "residual"),
    collective=True,
    fake=fake_all_reduce_add_norm,
)
for _op in (all_reduce, all_reduce_add):
    _op.implementation(
        "triton",
        f"reprise.ops.all_reduce.triton:{_op.name}",
        requires=needs_triton,
        accepts=reached,
    )
    _op.implementation(
        "invariant", f"reprise.ops.all_reduce.invariant:{_op.name}", batch_invariant=True
    )


def _norms_alone(residual: Tensor, **_: Any) -> str | None:
    return sums_alone(x=residual)


all_reduce_add_norm.implementation(
    "triton", "reprise.ops.all_reduce.triton:all_reduce_add_norm", requires=needs_triton
)
all_reduce_add_norm.implementation(
    "invariant",
    "reprise.ops.all_reduce.invariant:all_reduce_add_norm",
    requires=needs_host_memory,
    accepts=_norms_alone,
    batch_invariant=True,
)
all_reduce_add_norm.implementation(
    "triton_invariant",
    "reprise.ops.all_reduce.triton_invariant:all_reduce_add_norm",
    requires=needs_triton,
    batch_invariant=True,
)
