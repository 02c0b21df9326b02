"""Streams in place of a residual stream: what a sublayer reads of them, and how they go on."""

from reprise.ops.hyper_connection.accepts import accepts
from reprise.ops.hyper_connection.cases import cases
from reprise.ops.hyper_connection.reference import fake, reference
from reprise.ops.registry import needs_triton, op

hyper_connection = op(
    "hyper_connection",
    reference,
    cases=cases,
    mutates=("streams", "post", "comb"),
    fake=fake,
    rows=("streams", "y", "post", "comb"),
)
hyper_connection.implementation(
    "triton",
    "reprise.ops.hyper_connection.triton:hyper_connection",
    requires=needs_triton,
    accepts=accepts,
)
