"""Products whose weights and activations have eight bits, with a scale for each block."""

from reprise.ops.fp8_linear import onednn, scaled_mm
from reprise.ops.fp8_linear.accepts import accepts
from reprise.ops.fp8_linear.cases import cases
from reprise.ops.fp8_linear.reference import fake, reference
from reprise.ops.linear import needs_onednn
from reprise.ops.registry import needs_triton, op

fp8_linear = op("fp8_linear", reference, cases=cases, fake=fake)
fp8_linear.implementation(
    "onednn", onednn.fp8_linear, requires=needs_onednn, accepts=onednn.accepts
)
fp8_linear.implementation(
    "torch", scaled_mm.fp8_linear, requires=scaled_mm.requires, accepts=scaled_mm.accepts
)
fp8_linear.implementation(
    "triton",
    "reprise.ops.fp8_linear.triton:fp8_linear",
    requires=needs_triton,
    accepts=accepts,
    on_request="compiled and interpreted, not yet run on a device in this form",
)
