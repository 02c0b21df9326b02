from reprise.ops.gated_rms_norm.cases import cases
from reprise.ops.gated_rms_norm.reference import fake, reference
from reprise.ops.registry import op

gated_rms_norm = op("gated_rms_norm", reference, cases=cases, fake=fake)
