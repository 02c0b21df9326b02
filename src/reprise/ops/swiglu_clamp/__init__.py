from reprise.ops.registry import needs_triton, op
from reprise.ops.swiglu_clamp.cases import cases
from reprise.ops.swiglu_clamp.reference import fake, reference

swiglu_clamp = op("swiglu_clamp", reference, cases=cases, fake=fake, rows=("x",))
swiglu_clamp.implementation(
    "triton",
    "reprise.ops.swiglu_clamp.triton:swiglu_clamp",
    requires=needs_triton,
)
