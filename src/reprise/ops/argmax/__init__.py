from reprise.ops.argmax.cases import cases
from reprise.ops.argmax.reference import fake, reference
from reprise.ops.registry import needs_triton, op

argmax = op("argmax", reference, cases=cases, fake=fake, rows=("logits",), batch_invariant=True)
argmax.implementation(
    "triton", "reprise.ops.argmax.triton:argmax", requires=needs_triton, batch_invariant=True
)
