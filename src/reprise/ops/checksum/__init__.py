from reprise.ops.checksum.cases import cases
from reprise.ops.checksum.reference import fake, reference
from reprise.ops.registry import needs_triton, op
from reprise.ops.step import needs_host_memory

checksum = op("checksum", reference, cases=cases, fake=fake, batch_invariant=True)
checksum.implementation(
    "triton", "reprise.ops.checksum.triton:checksum", requires=needs_triton, batch_invariant=True
)
checksum.implementation(
    "numpy",
    "reprise.ops.checksum.host:checksum",
    requires=needs_host_memory,
    batch_invariant=True,
)
