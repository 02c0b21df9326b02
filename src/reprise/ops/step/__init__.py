"""What surrounds a forward pass on the device: from rows to its inputs, from its draws to rows."""

from reprise.ops.registry import needs_triton, op
from reprise.ops.step import reference
from reprise.ops.step.cases import advance_cases, lay_out_cases
from reprise.ops.step.reference import ACCEPTED, COMPUTED, LIMIT, NEXT, PROMPT
from reprise.platforms import Platform

__all__ = [
    "ACCEPTED",
    "COMPUTED",
    "LIMIT",
    "NEXT",
    "PROMPT",
    "advance",
    "lay_out",
    "needs_host_memory",
]


def needs_host_memory(platform: Platform) -> str | None:
    return None if platform.device_type == "cpu" else "computes on the host"


lay_out = op(
    "lay_out",
    reference.lay_out,
    cases=lay_out_cases,
    mutates=("token_ids", "positions", "draws", "slots", "seq_lens", "accepted", "fresh"),
    batch_invariant=True,
)
advance = op(
    "advance",
    reference.advance,
    cases=advance_cases,
    mutates=("numbers", "emitted"),
    batch_invariant=True,
)
for _op in (lay_out, advance):
    for _name, _module, _requires in (
        ("triton", "triton", needs_triton),
        ("numpy", "host", needs_host_memory),
    ):
        _target = f"reprise.ops.step.{_module}:{_op.name}"
        _op.implementation(_name, _target, requires=_requires, batch_invariant=True)
