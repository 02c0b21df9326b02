"""Rows to the ranks that have their experts, and what these give back to the rows' own ranks."""

from reprise.distributed import reached
from reprise.ops.dispatch.all_to_all import graph_support
from reprise.ops.dispatch.cases import combine_cases, dispatch_cases
from reprise.ops.dispatch.reference import combine as _combine
from reprise.ops.dispatch.reference import dispatch as _dispatch
from reprise.ops.registry import needs_triton, op

dispatch = op(
    "dispatch",
    _dispatch,
    cases=dispatch_cases,
    mutates=("rows", "rows_weights", "rows_ids"),
    collective=True,
)
combine = op("combine", _combine, cases=combine_cases, mutates=("out",), collective=True)
for _op in (dispatch, combine):
    _op.implementation(
        "triton",
        f"reprise.ops.dispatch.triton:{_op.name}",
        requires=needs_triton,
        accepts=reached,
    )
    _op.implementation(
        "all_to_all",
        f"reprise.ops.dispatch.all_to_all:{_op.name}",
        graph_support=graph_support,
        on_request="it gains where rows go to few of many ranks, and graphs of devices exclude it",
    )
combine.implementation(
    "reduce_scatter",
    "reprise.ops.dispatch.backend_sum:combine",
    on_request="the backend adds in an order of its own",
)
