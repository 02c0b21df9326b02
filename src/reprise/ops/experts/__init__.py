"""Products of rows with the experts that each was sent to, and the sum of what these give."""

from reprise.ops.experts import cases, reference
from reprise.ops.experts.torch import accepts, needs_grouped_mm
from reprise.ops.registry import Op, needs_triton, op


def _declare(name: str, mutates: tuple[str, ...] = ()) -> Op:
    fake = getattr(reference, f"fake_{name}", None)
    declared = op(
        name, getattr(reference, name), cases=getattr(cases, name), mutates=mutates, fake=fake
    )
    target = f"reprise.ops.experts.triton:{name}"
    declared.implementation("triton", target, requires=needs_triton)
    target = f"reprise.ops.experts.torch:{name}"
    declared.implementation("torch", target, requires=needs_grouped_mm, accepts=accepts)
    return declared


experts = _declare("experts")
experts_add = _declare("experts_add", mutates=("residual",))
