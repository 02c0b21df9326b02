from reprise.ops.causal_conv.cases import cases
from reprise.ops.causal_conv.reference import reference
from reprise.ops.registry import needs_triton, on_the_host, op

causal_conv = op(
    "causal_conv",
    reference,
    cases=cases,
    mutates=("out", "state"),
    extent="seq_lens",
    state=("state",),
    rows=("x", "out", "places"),
    requests=("slots", "seq_lens", "fresh", "accepted", "known"),
    strided=("slots",),
    batch_invariant=on_the_host,
)
causal_conv.implementation(
    "triton",
    "reprise.ops.causal_conv.triton:causal_conv",
    requires=needs_triton,
)
causal_conv.implementation(
    "triton_invariant",
    "reprise.ops.causal_conv.triton:invariant",
    requires=needs_triton,
    batch_invariant=True,
)
