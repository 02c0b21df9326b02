from reprise.ops.registry import needs_triton, op
from reprise.ops.rotary_tail.cases import cases
from reprise.ops.rotary_tail.reference import fake, reference

rotary_tail = op(
    "rotary_tail", reference, cases=cases, extent="positions", fake=fake, rows=("x", "positions")
)
rotary_tail.implementation(
    "triton",
    "reprise.ops.rotary_tail.triton:rotary_tail",
    requires=needs_triton,
)
