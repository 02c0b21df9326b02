"""Attention of one head of keys that are values too: a window, compressed rows, a sink."""

from reprise.ops.indexer import host_lengths
from reprise.ops.latent_rows import takes_codes
from reprise.ops.registry import needs_triton, op
from reprise.ops.sparse_attention.cases import cases
from reprise.ops.sparse_attention.reference import reference

sparse_attention = op(
    "sparse_attention",
    reference,
    cases=cases,
    mutates=("out",),
    break_op=True,
    extent="seq_lens",
    rows=("query", "selected", "out"),
    requests=("block_tables", "compressed_tables", "seq_lens"),
    graph_support=host_lengths,
)
sparse_attention.implementation(
    "triton",
    "reprise.ops.sparse_attention.triton:sparse_attention",
    requires=needs_triton,
    accepts=takes_codes,
    graph_support="always",
)
