from reprise.ops.registry import needs_triton, op
from reprise.ops.rms_norm.cases import cases
from reprise.ops.rms_norm.reference import fake, reference

rms_norm = op("rms_norm", reference, cases=cases, fake=fake)
rms_norm.implementation("triton", "reprise.ops.rms_norm.triton:rms_norm", requires=needs_triton)
