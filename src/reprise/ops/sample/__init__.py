from reprise.ops.registry import needs_triton, op
from reprise.ops.sample.cases import cases
from reprise.ops.sample.reference import fake, reference

sample = op("sample", reference, cases=cases, fake=fake)
sample.implementation("triton", "reprise.ops.sample.triton:sample", requires=needs_triton)
