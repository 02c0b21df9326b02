from reprise.ops.gated_delta.cases import cases
from reprise.ops.gated_delta.reference import reference
from reprise.ops.registry import needs_triton, op
from reprise.platforms import Platform


def _needs_cpu_memory(platform: Platform) -> str | None:
    if platform.device_type == "cpu":
        return None
    return "reads lengths on the host, which would stall an accelerator"


gated_delta = op(
    "gated_delta",
    reference,
    cases=cases,
    mutates=("out", "state"),
    break_op=True,
    extent="seq_lens",
    state=("state",),
    graph_support="never",
)

gated_delta.implementation(
    "triton",
    "reprise.ops.gated_delta.triton:gated_delta",
    requires=needs_triton,
    graph_support="always",
)
gated_delta.implementation(
    "torch",
    "reprise.ops.gated_delta.chunked:gated_delta",
    requires=_needs_cpu_memory,
    graph_support="always",
)
