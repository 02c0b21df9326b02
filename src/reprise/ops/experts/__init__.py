"""Products of rows with the experts that each was sent to, and the sum of what these give."""

from reprise.ops.experts import cases, reference
from reprise.ops.experts.accepts import accepts
from reprise.ops.experts.invariant import accepts as clamps_nothing
from reprise.ops.experts.torch import accepts as fits
from reprise.ops.experts.torch import needs_grouped_mm
from reprise.ops.implementation import anything
from reprise.ops.registry import Op, needs_triton, op
from reprise.ops.step import needs_host_memory


def _declare(name: str, mutates: tuple[str, ...] = ()) -> Op:
    fake = getattr(reference, f"fake_{name}", None)
    declared = op(
        name,
        getattr(reference, name),
        cases=getattr(cases, name),
        mutates=mutates,
        rows=("x", "weights", "ids", *mutates),
        fake=fake,
    )
    target = f"reprise.ops.experts.triton:{name}"
    takes = accepts if name == "experts" else anything
    declared.implementation("triton", target, requires=needs_triton, accepts=takes)
    target = f"reprise.ops.experts.torch:{name}"
    declared.implementation("torch", target, requires=needs_grouped_mm, accepts=fits)
    declared.implementation(
        "invariant",
        f"reprise.ops.experts.invariant:{name}",
        requires=needs_host_memory,
        accepts=clamps_nothing if name == "experts" else anything,
        batch_invariant=True,
    )
    declared.implementation(
        "triton_invariant",
        f"reprise.ops.experts.triton_invariant:{name}",
        requires=needs_triton,
        accepts=takes,
        batch_invariant=True,
    )
    return declared


experts = _declare("experts")
experts_add = _declare("experts_add", mutates=("residual",))
