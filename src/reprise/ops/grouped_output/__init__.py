from reprise.ops.grouped_output.cases import cases
from reprise.ops.grouped_output.reference import fake, reference
from reprise.ops.registry import needs_triton, op

grouped_output = op("grouped_output", reference, cases=cases, fake=fake, rows=("x",))
grouped_output.implementation(
    "triton",
    "reprise.ops.grouped_output.triton:grouped_output",
    requires=needs_triton,
)
