"""From where a step has left its requests to the inputs of what drafts behind it."""

from reprise.ops.draft_inputs.cases import cases
from reprise.ops.draft_inputs.reference import reference
from reprise.ops.registry import needs_triton, op
from reprise.ops.step import needs_host_memory

draft_inputs = op(
    "draft_inputs",
    reference,
    cases=cases,
    mutates=(
        "shifted_ids", "last", "rows", "token_ids", "positions", "slots", "seq_lens", "accepted",
        "fresh", "temperature", "top_k", "top_p", "min_p", "seed", "number",
    ),
    batch_invariant=True,
)  # fmt: skip
draft_inputs.implementation(
    "triton",
    "reprise.ops.draft_inputs.triton:draft_inputs",
    requires=needs_triton,
    batch_invariant=True,
)
draft_inputs.implementation(
    "numpy",
    "reprise.ops.draft_inputs.host:draft_inputs",
    requires=needs_host_memory,
    batch_invariant=True,
)
