"""Experts whose weights and activations have eight bits."""

from reprise.ops.experts.torch import needs_grouped_mm
from reprise.ops.fp8_experts.cases import cases
from reprise.ops.fp8_experts.reference import fake, reference
from reprise.ops.fp8_experts.torch import accepts
from reprise.ops.registry import op

fp8_experts = op("fp8_experts", reference, cases=cases, fake=fake)
fp8_experts.implementation(
    "torch",
    "reprise.ops.fp8_experts.torch:fp8_experts",
    requires=needs_grouped_mm,
    accepts=accepts,
)
