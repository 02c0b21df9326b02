"""Matrix products, alone and with what a decoder does right before or behind them."""

import torch

from reprise.ops.linear import reference
from reprise.ops.registry import Op, needs_triton, op
from reprise.platforms import Platform


def _needs_onednn(platform: Platform) -> str | None:
    if platform.device.type != "cpu":
        return "oneDNN computes on the CPU"
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


_REQUIREMENTS = {"triton": needs_triton, "onednn": _needs_onednn}


def _with(declared: Op, *names: str) -> Op:
    for name in names:
        target = f"reprise.ops.linear.{name}:{declared.name}"
        declared.implementation(name, target, requires=_REQUIREMENTS[name])
    return declared


linear = _with(op("linear", reference.linear, fake=reference.fake_linear), "triton", "onednn")
norm_linear = _with(
    op("norm_linear", reference.norm_linear, fake=reference.fake_norm_linear), "triton", "onednn"
)
norm_gated_linear = _with(
    op("norm_gated_linear", reference.norm_gated_linear, fake=reference.fake_norm_gated_linear),
    "triton",
    "onednn",
)
linear_add = _with(
    op("linear_add", reference.linear_add, mutates=("residual",)), "triton", "onednn"
)
linear_into = _with(op("linear_into", reference.linear_into, mutates=("out",)), "onednn")
