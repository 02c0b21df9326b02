"""Experts whose weights have four bits, and a power of two for each 32 of them (OCP MX)."""

from reprise.ops.mxfp4_experts.cases import cases
from reprise.ops.mxfp4_experts.reference import fake, reference
from reprise.ops.registry import needs_triton, op

mxfp4_experts = op("mxfp4_experts", reference, cases=cases, fake=fake, rows=("x", "weights", "ids"))
mxfp4_experts.implementation(
    "triton",
    "reprise.ops.mxfp4_experts.triton:mxfp4_experts",
    requires=needs_triton,
)
