from reprise.ops.fused_add_rms_norm.reference import reference
from reprise.ops.registry import needs_triton, op

fused_add_rms_norm = op("fused_add_rms_norm", reference, mutates=("x", "residual"))
fused_add_rms_norm.implementation(
    "triton",
    "reprise.ops.fused_add_rms_norm.triton:fused_add_rms_norm",
    requires=needs_triton,
)
