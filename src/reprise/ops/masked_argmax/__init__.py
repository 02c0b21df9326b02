from reprise.ops.masked_argmax.cases import cases
from reprise.ops.masked_argmax.reference import fake, reference
from reprise.ops.registry import needs_triton, op
from reprise.ops.step import needs_host_memory

masked_argmax = op(
    "masked_argmax",
    reference,
    cases=cases,
    fake=fake,
    mutates=("peaks",),
    batch_invariant=True,
    rows=("logits", "which", "peaks"),
)
masked_argmax.implementation(
    "triton",
    "reprise.ops.masked_argmax.triton:masked_argmax",
    requires=needs_triton,
    batch_invariant=True,
)
masked_argmax.implementation(
    "numpy",
    "reprise.ops.masked_argmax.host:masked_argmax",
    requires=needs_host_memory,
    batch_invariant=True,
)
