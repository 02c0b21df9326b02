"""Matrix products, alone and with what a decoder does right before or behind them."""

import torch

from reprise.ops.linear import reference
from reprise.ops.registry import Op, needs_triton, op
from reprise.platforms import Platform


def _needs_onednn(platform: Platform) -> str | None:
    if platform.device.type != "cpu":
        return "oneDNN computes on the CPU"
    return None if torch.backends.mkldnn.is_available() else "this torch is built without oneDNN"


def _with_implementations(declared: Op) -> Op:
    for name, requires in (("triton", needs_triton), ("onednn", _needs_onednn)):
        target = f"reprise.ops.linear.{name}:{declared.name}"
        declared.implementation(name, target, requires=requires)
    return declared


linear = _with_implementations(op("linear", reference.linear, fake=reference.fake_linear))
norm_linear = _with_implementations(
    op("norm_linear", reference.norm_linear, fake=reference.fake_norm_linear)
)
norm_gated_linear = _with_implementations(
    op("norm_gated_linear", reference.norm_gated_linear, fake=reference.fake_norm_gated_linear)
)
linear_add = _with_implementations(op("linear_add", reference.linear_add, mutates=("residual",)))
