"""Columns of every rank side by side."""

from reprise.ops.all_gather.cases import cases
from reprise.ops.all_gather.reference import all_gather as _all_gather
from reprise.ops.registry import op

all_gather = op(
    "all_gather",
    _all_gather,
    cases=cases,
    mutates=("out",),
    rows=("x", "out"),
    collective=True,
    batch_invariant=True,  # nothing is computed
)
