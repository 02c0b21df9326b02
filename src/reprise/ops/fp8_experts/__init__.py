"""Experts whose weights and activations have eight bits."""

from reprise.ops.experts.torch import needs_grouped_mm
from reprise.ops.fp8_experts.accepts import accepts
from reprise.ops.fp8_experts.cases import cases
from reprise.ops.fp8_experts.reference import fake, reference
from reprise.ops.fp8_experts.torch import accepts as fits
from reprise.ops.registry import needs_triton, op

fp8_experts = op("fp8_experts", reference, cases=cases, fake=fake, rows=("x", "weights", "ids"))
fp8_experts.implementation(
    "torch",
    "reprise.ops.fp8_experts.torch:fp8_experts",
    requires=needs_grouped_mm,
    accepts=fits,
)
fp8_experts.implementation(
    "triton",
    "reprise.ops.fp8_experts.triton:fp8_experts",
    requires=needs_triton,
    accepts=accepts,
)
