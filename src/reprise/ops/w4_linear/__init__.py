"""Products whose weights have four bits, with a scale for each group of inputs."""

from reprise.ops.linear import needs_onednn
from reprise.ops.registry import needs_triton, op
from reprise.ops.w4_linear import onednn
from reprise.ops.w4_linear.accepts import accepts
from reprise.ops.w4_linear.cases import cases
from reprise.ops.w4_linear.reference import fake, reference

w4_linear = op("w4_linear", reference, cases=cases, fake=fake)
w4_linear.implementation("onednn", onednn.w4_linear, requires=needs_onednn, accepts=onednn.accepts)
w4_linear.implementation(
    "triton",
    "reprise.ops.w4_linear.triton:w4_linear",
    requires=needs_triton,
    accepts=accepts,
    on_request="compiled and interpreted, not yet run on a device in this form",
)
