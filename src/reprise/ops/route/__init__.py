from reprise.ops.registry import needs_triton, on_the_host, op
from reprise.ops.route.cases import cases
from reprise.ops.route.reference import reference

route = op(
    "route",
    reference,
    cases=cases,
    mutates=("weights", "ids"),
    rows=("logits", "weights", "ids", "chosen"),
    batch_invariant=on_the_host,
)
route.implementation(
    "triton", "reprise.ops.route.triton:route", requires=needs_triton, batch_invariant=True
)
