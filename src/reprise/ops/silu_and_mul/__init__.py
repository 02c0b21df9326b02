from reprise.ops.registry import needs_triton, op
from reprise.ops.silu_and_mul.cases import cases
from reprise.ops.silu_and_mul.reference import fake, reference

silu_and_mul = op("silu_and_mul", reference, cases=cases, fake=fake)
silu_and_mul.implementation(
    "triton", "reprise.ops.silu_and_mul.triton:silu_and_mul", requires=needs_triton
)
