"""Streams made one again behind the last sublayer."""

from reprise.ops.hyper_connection.accepts import accepts
from reprise.ops.hyper_head.cases import cases
from reprise.ops.hyper_head.reference import fake, reference
from reprise.ops.registry import needs_triton, op

hyper_head = op(
    "hyper_head",
    reference,
    cases=cases,
    mutates=("streams",),
    fake=fake,
    rows=("streams", "y", "post", "comb"),
)
hyper_head.implementation(
    "triton",
    "reprise.ops.hyper_head.triton:hyper_head",
    requires=needs_triton,
    accepts=accepts,
)
