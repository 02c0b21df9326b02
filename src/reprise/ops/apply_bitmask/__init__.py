from reprise.ops.apply_bitmask.cases import cases
from reprise.ops.apply_bitmask.reference import fake, reference
from reprise.ops.registry import needs_triton, op
from reprise.ops.step import needs_host_memory

__all__ = ["apply_bitmask"]

apply_bitmask = op(
    "apply_bitmask",
    reference,
    cases=cases,
    fake=fake,
    batch_invariant=True,
    rows=("logits", "which"),
)
apply_bitmask.implementation(
    "triton",
    "reprise.ops.apply_bitmask.triton:apply_bitmask",
    requires=needs_triton,
    batch_invariant=True,
)
apply_bitmask.implementation(
    "numpy",
    "reprise.ops.apply_bitmask.host:apply_bitmask",
    requires=needs_host_memory,
    batch_invariant=True,
)
