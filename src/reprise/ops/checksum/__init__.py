from reprise.ops.checksum.cases import cases
from reprise.ops.checksum.reference import fake, reference
from reprise.ops.registry import needs_triton, op

checksum = op("checksum", reference, cases=cases, fake=fake, batch_invariant=True)
checksum.implementation(
    "triton", "reprise.ops.checksum.triton:checksum", requires=needs_triton, batch_invariant=True
)
