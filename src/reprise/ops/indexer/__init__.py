"""Which compressed rows a token looks at: the lightning indexer of DeepSeek's sparse attention."""

from reprise.ops.implementation import GraphSupport
from reprise.ops.indexer.accepts import accepts
from reprise.ops.indexer.cases import cases
from reprise.ops.indexer.reference import reference
from reprise.ops.registry import needs_triton, op
from reprise.platforms import Platform


def host_lengths(platform: Platform) -> GraphSupport:
    """Of ops that read lengths on the host: from a CPU's memory, which a replay does again."""
    return "always" if platform.device_type == "cpu" else "never"


indexer = op(
    "indexer",
    reference,
    cases=cases,
    mutates=("out",),
    break_op=True,
    extent="seq_lens",
    rows=("query", "weights", "out"),
    requests=("block_tables", "seq_lens"),
    graph_support=host_lengths,
)
indexer.implementation(
    "triton",
    "reprise.ops.indexer.triton:indexer",
    requires=needs_triton,
    graph_support="always",
    accepts=accepts,
)
