"""Products whose weights have four bits, with a scale for each group of inputs: alone and with what
a decoder does right before or behind them."""

from reprise.ops.linear import needs_onednn
from reprise.ops.linear.around import Plain, declare
from reprise.ops.registry import needs_triton
from reprise.ops.step import needs_host_memory
from reprise.ops.w4_linear import cases, onednn, reference
from reprise.ops.w4_linear.accepts import accepts

w4_linear, w4_norm_linear, w4_norm_gated_linear, w4_linear_add = declare(
    "w4",
    reference,
    cases,
    {"onednn": Plain(onednn.w4_linear, needs_onednn, onednn.accepts)},
    accepts,
    {"invariant": needs_host_memory, "triton_invariant": needs_triton},
)
