from reprise.ops.gated_delta.cases import cases
from reprise.ops.gated_delta.reference import reference
from reprise.ops.implementation import GraphSupport
from reprise.ops.registry import needs_triton, op
from reprise.ops.step import needs_host_memory
from reprise.platforms import Platform


def _graphs(platform: Platform) -> GraphSupport:
    """Lengths of prompts are read on the host: from a CPU's memory, which a replay does again."""
    return "always" if platform.device_type == "cpu" else "uniform_batch"


gated_delta = op(
    "gated_delta",
    reference,
    cases=cases,
    mutates=("out", "state", "recent", "gates"),
    break_op=True,
    extent="seq_lens",
    state=("state", "recent", "gates"),
    graph_support="never",
    rows=("qkv", "a", "b", "out", "places"),
    requests=("slots", "seq_lens", "fresh", "accepted", "known"),
    strided=("slots",),
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
    graph_support=_graphs,
)
gated_delta.implementation(
    "invariant",
    "reprise.ops.gated_delta.invariant:gated_delta",
    requires=needs_host_memory,
    graph_support="always",
    batch_invariant=True,
)
gated_delta.implementation(
    "triton_invariant",
    "reprise.ops.gated_delta.triton:invariant",
    requires=needs_triton,
    graph_support="always",
    batch_invariant=True,
)
