"""Experts whose weights and activations have eight bits."""

from reprise.ops.experts.torch import needs_grouped_mm
from reprise.ops.fp8_experts import cases, reference
from reprise.ops.fp8_experts.torch import accepts
from reprise.ops.registry import Op, op


def _declare(name: str, mutates: tuple[str, ...] = ()) -> Op:
    fake = getattr(reference, f"fake_{name}", None)
    declared = op(
        name, getattr(reference, name), cases=getattr(cases, name), mutates=mutates, fake=fake
    )
    target = f"reprise.ops.fp8_experts.torch:{name}"
    declared.implementation("torch", target, requires=needs_grouped_mm, accepts=accepts)
    return declared


fp8_experts = _declare("fp8_experts")
fp8_experts_add = _declare("fp8_experts_add", mutates=("residual",))
