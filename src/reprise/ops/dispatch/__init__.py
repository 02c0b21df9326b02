"""Rows to the ranks that have their experts, and what these give back to the rows' own ranks."""

from reprise.ops.dispatch.cases import combine_cases, dispatch_cases
from reprise.ops.dispatch.reference import combine as _combine
from reprise.ops.dispatch.reference import dispatch as _dispatch
from reprise.ops.registry import op

dispatch = op(
    "dispatch",
    _dispatch,
    cases=dispatch_cases,
    mutates=("rows", "rows_weights", "rows_ids"),
    collective=True,
)
combine = op("combine", _combine, cases=combine_cases, mutates=("out",), collective=True)
