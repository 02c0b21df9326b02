from reprise.ops.registry import needs_triton, on_the_host, op
from reprise.ops.sample.cases import cases
from reprise.ops.sample.reference import fake, reference
from reprise.ops.step import needs_host_memory

sample = op(
    "sample",
    reference,
    cases=cases,
    fake=fake,
    rows=("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions"),
    batch_invariant=on_the_host,
)
sample.implementation(
    "triton", "reprise.ops.sample.triton:sample", requires=needs_triton, batch_invariant=True
)
sample.implementation(
    "numpy",
    "reprise.ops.sample.host:sample",
    requires=needs_host_memory,
    batch_invariant=True,
)
