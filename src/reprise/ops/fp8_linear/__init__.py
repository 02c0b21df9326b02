"""Products whose weights and activations have eight bits, with a scale for each block: alone and
with what a decoder does right before or behind them."""

from reprise.ops.fp8_linear import cases, onednn, reference, scaled_mm
from reprise.ops.fp8_linear.accepts import accepts
from reprise.ops.linear import needs_onednn
from reprise.ops.linear.around import Plain, declare
from reprise.ops.registry import needs_triton
from reprise.ops.step import needs_host_memory

fp8_linear, fp8_norm_linear, fp8_norm_gated_linear, fp8_linear_add = declare(
    "fp8",
    reference,
    cases,
    {
        "onednn": Plain(onednn.fp8_linear, needs_onednn, onednn.accepts),
        "torch": Plain(scaled_mm.fp8_linear, scaled_mm.requires, scaled_mm.accepts),
    },
    accepts,
    {"invariant": needs_host_memory, "triton_invariant": needs_triton},
)
