from reprise.ops.registry import needs_triton, op
from reprise.ops.sample.cases import cases
from reprise.ops.sample.reference import fake, reference
from reprise.ops.step import needs_host_memory

sample = op("sample", reference, cases=cases, fake=fake)
sample.implementation("triton", "reprise.ops.sample.triton:sample", requires=needs_triton)
sample.implementation("numpy", "reprise.ops.sample.host:sample", requires=needs_host_memory)
