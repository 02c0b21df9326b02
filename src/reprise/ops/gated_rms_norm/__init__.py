from reprise.ops.gated_rms_norm.cases import cases
from reprise.ops.gated_rms_norm.reference import fake, reference
from reprise.ops.registry import needs_triton, on_the_host, op

gated_rms_norm = op(
    "gated_rms_norm",
    reference,
    cases=cases,
    fake=fake,
    rows=("x", "gate"),
    batch_invariant=on_the_host,
)
gated_rms_norm.implementation(
    "triton",
    "reprise.ops.gated_rms_norm.triton:gated_rms_norm",
    requires=needs_triton,
    batch_invariant=True,
)
