from reprise.ops.cpp import needs_compiler
from reprise.ops.registry import needs_triton, on_the_host, op
from reprise.ops.rotary_cache.cases import cases
from reprise.ops.rotary_cache.reference import fake, reference
from reprise.ops.step import needs_host_memory

_CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")

rotary_cache = op(
    "rotary_cache",
    reference,
    cases=cases,
    mutates=_CACHES,
    extent="positions",
    state=_CACHES,
    rows=("qkv", "positions", "slot_mapping"),
    fake=fake,
    batch_invariant=on_the_host,
)
rotary_cache.implementation(
    "triton",
    "reprise.ops.rotary_cache.triton:rotary_cache",
    requires=needs_triton,
    batch_invariant=True,
)
rotary_cache.implementation(
    "torch",
    "reprise.ops.rotary_cache.host:rotary_cache",
    requires=needs_host_memory,
    batch_invariant=True,
)
rotary_cache.implementation(
    "cpp", "reprise.ops.rotary_cache.cpp:rotary_cache", requires=needs_compiler
)
