from reprise.ops.registry import needs_triton, op
from reprise.ops.rotary_cache.cases import cases
from reprise.ops.rotary_cache.reference import fake, reference

rotary_cache = op(
    "rotary_cache",
    reference,
    cases=cases,
    mutates=("key_cache", "value_cache"),
    extent="positions",
    state=("key_cache", "value_cache"),
    fake=fake,
)
rotary_cache.implementation(
    "triton", "reprise.ops.rotary_cache.triton:rotary_cache", requires=needs_triton
)
