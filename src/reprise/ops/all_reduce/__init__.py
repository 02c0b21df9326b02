"""Sums over the ranks of a group, alone and with the residual stream behind them."""

from reprise.distributed import reached
from reprise.ops.all_reduce.cases import add_cases, cases
from reprise.ops.all_reduce.reference import all_reduce as _all_reduce
from reprise.ops.all_reduce.reference import all_reduce_add as _all_reduce_add
from reprise.ops.registry import needs_triton, op

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
