"""Matrix products, alone and with what a decoder does right before or behind them."""

import torch

from reprise.ops.cpp import needs_compiler
from reprise.ops.implementation import anything
from reprise.ops.linear import cases, reference
from reprise.ops.registry import Op, needs_triton, op
from reprise.ops.rms_norm.accepts import sums_alone
from reprise.ops.step import needs_host_memory
from reprise.platforms import Platform


def needs_onednn(platform: Platform) -> str | None:
    if platform.device.type != "cpu":
        return "oneDNN computes on the CPU"
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


_REQUIREMENTS = {
    "triton": needs_triton,
    "onednn": needs_onednn,
    "cpp": needs_compiler,
    "invariant": needs_host_memory,
    "triton_invariant": needs_triton,
}


def _declare(name: str, *implementations: str, mutates: tuple[str, ...] = ()) -> Op:
    declared = op(
        name,
        getattr(reference, name),
        cases=getattr(cases, name),
        mutates=mutates,
        rows=("x", *mutates),
        fake=getattr(reference, f"fake_{name}", None),
    )
    for each in (*implementations, "invariant", "triton_invariant"):
        declared.implementation(
            each,
            f"reprise.ops.linear.{each}:{name}",
            requires=_REQUIREMENTS[each],
            accepts=sums_alone if each == "invariant" and name.startswith("norm") else anything,
            batch_invariant=each.endswith("invariant"),
        )
    return declared


linear = _declare("linear", "triton", "onednn", "cpp")
gated_linear = _declare("gated_linear", "triton", "onednn", "cpp")
norm_linear = _declare("norm_linear", "triton", "onednn", "cpp")
norm_gated_linear = _declare("norm_gated_linear", "triton", "onednn", "cpp")
linear_add = _declare("linear_add", "triton", "onednn", "cpp", mutates=("residual",))
linear_into = _declare("linear_into", "onednn", "cpp", mutates=("out",))
