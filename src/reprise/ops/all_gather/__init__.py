"""Columns of every rank side by side."""

from typing import Any

from torch import Tensor

from reprise.ops.all_gather.cases import cases
from reprise.ops.all_gather.reference import all_gather as _all_gather
from reprise.ops.registry import needs_triton, op


def _columns_adjoin(out: Tensor, **_: Any) -> str | None:
    return None if out.stride(1) == 1 else "columns of the output do not adjoin"


all_gather = op(
    "all_gather",
    _all_gather,
    cases=cases,
    mutates=("out",),
    rows=("x", "out"),
    collective=True,
    batch_invariant=True,  # nothing is computed
)
all_gather.implementation(
    "triton",
    "reprise.ops.all_gather.triton:all_gather",
    requires=needs_triton,
    accepts=_columns_adjoin,
    batch_invariant=True,
)
