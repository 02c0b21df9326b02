"""What attention gives rotated back, and a product with eight bits for each group of heads."""

from reprise.ops.fp8_linear import onednn
from reprise.ops.fp8_rotated_output.accepts import in_one, of_one
from reprise.ops.fp8_rotated_output.by_parts import rotated_output
from reprise.ops.fp8_rotated_output.cases import cases
from reprise.ops.fp8_rotated_output.reference import fake, reference
from reprise.ops.linear import needs_onednn
from reprise.ops.registry import needs_triton, op

fp8_rotated_output = op(
    "fp8_rotated_output", reference, cases=cases, extent="positions", fake=fake,
    rows=("x", "positions"),
)  # fmt: skip
fp8_rotated_output.implementation(
    "onednn",
    rotated_output(onednn.fp8_linear),
    requires=needs_onednn,
    accepts=of_one(onednn.accepts),
)
fp8_rotated_output.implementation(
    "triton",
    "reprise.ops.fp8_rotated_output.triton:fp8_rotated_output",
    requires=needs_triton,
    accepts=in_one,
)
