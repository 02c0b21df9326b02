from reprise.ops.registry import needs_triton, op
from reprise.ops.wide_linear.cases import cases
from reprise.ops.wide_linear.reference import fake, reference

wide_linear = op("wide_linear", reference, cases=cases, fake=fake, rows=("x",))
wide_linear.implementation(
    "triton",
    "reprise.ops.wide_linear.triton:wide_linear",
    requires=needs_triton,
)
