from reprise.ops.kv_insert.cases import cases
from reprise.ops.kv_insert.reference import reference
from reprise.ops.latent_rows import takes_codes
from reprise.ops.registry import needs_triton, op

kv_insert = op(
    "kv_insert",
    reference,
    cases=cases,
    mutates=("cache", "tail", "scales"),
    extent="positions",
    rows=("kv", "positions", "slots"),
    state=("cache", "tail", "scales"),
)
kv_insert.implementation(
    "triton",
    "reprise.ops.kv_insert.triton:kv_insert",
    requires=needs_triton,
    accepts=takes_codes,
)
