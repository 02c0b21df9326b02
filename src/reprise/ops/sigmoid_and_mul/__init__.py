from reprise.ops.registry import needs_triton, on_an_accelerator, op
from reprise.ops.sigmoid_and_mul.cases import cases
from reprise.ops.sigmoid_and_mul.reference import fake, reference
from reprise.ops.step import needs_host_memory

sigmoid_and_mul = op(
    "sigmoid_and_mul",
    reference,
    cases=cases,
    fake=fake,
    rows=("x", "gate"),
    batch_invariant=on_an_accelerator,
)
sigmoid_and_mul.implementation(
    "triton",
    "reprise.ops.sigmoid_and_mul.triton:sigmoid_and_mul",
    requires=needs_triton,
    batch_invariant=True,
)
sigmoid_and_mul.implementation(
    "invariant",
    "reprise.ops.sigmoid_and_mul.invariant:sigmoid_and_mul",
    requires=needs_host_memory,
    batch_invariant=True,
)
