"""One cache row of so many tokens: weighted, normalised, rotated, stored with its last one."""

from reprise.ops.compressor.cases import cases
from reprise.ops.compressor.reference import reference
from reprise.ops.latent_rows import takes_codes
from reprise.ops.registry import needs_triton, op

compressor = op(
    "compressor",
    reference,
    cases=cases,
    mutates=("state", "cache", "tail", "scales"),
    extent="seq_lens",
    state=("state", "cache", "tail", "scales"),
)
compressor.implementation(
    "triton",
    "reprise.ops.compressor.triton:compressor",
    requires=needs_triton,
    accepts=takes_codes,
)
