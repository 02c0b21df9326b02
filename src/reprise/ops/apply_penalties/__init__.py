from reprise.ops.apply_penalties.cases import cases
from reprise.ops.apply_penalties.reference import IN_PROMPT, reference
from reprise.ops.registry import needs_triton, op

__all__ = ["IN_PROMPT", "apply_penalties"]

apply_penalties = op(
    "apply_penalties", reference, cases=cases, mutates=("logits",), batch_invariant=True
)
apply_penalties.implementation(
    "triton",
    "reprise.ops.apply_penalties.triton:apply_penalties",
    requires=needs_triton,
    batch_invariant=True,
)
