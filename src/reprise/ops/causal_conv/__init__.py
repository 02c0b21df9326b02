from reprise.ops.causal_conv.cases import cases
from reprise.ops.causal_conv.reference import reference
from reprise.ops.registry import needs_triton, op

causal_conv = op(
    "causal_conv",
    reference,
    cases=cases,
    mutates=("out", "state"),
    extent="seq_lens",
    state=("state",),
)
causal_conv.implementation(
    "triton",
    "reprise.ops.causal_conv.triton:causal_conv",
    requires=needs_triton,
)
