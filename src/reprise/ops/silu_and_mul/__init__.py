from reprise.ops.registry import needs_triton, op
from reprise.ops.silu_and_mul.cases import cases
from reprise.ops.silu_and_mul.reference import fake, reference
from reprise.ops.step import needs_host_memory

silu_and_mul = op("silu_and_mul", reference, cases=cases, fake=fake, rows=("x",))
silu_and_mul.implementation(
    "triton",
    "reprise.ops.silu_and_mul.triton:silu_and_mul",
    requires=needs_triton,
    batch_invariant=True,
)
silu_and_mul.implementation(
    "invariant",
    "reprise.ops.silu_and_mul.invariant:silu_and_mul",
    requires=needs_host_memory,
    batch_invariant=True,
)
