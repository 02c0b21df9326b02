from reprise.ops.registry import needs_triton, on_the_host, op
from reprise.ops.rms_norm.accepts import sums_alone
from reprise.ops.rms_norm.cases import cases
from reprise.ops.rms_norm.reference import fake, reference

rms_norm = op("rms_norm", reference, cases=cases, fake=fake, rows=("x",))
rms_norm.implementation(
    "triton", "reprise.ops.rms_norm.triton:rms_norm", requires=needs_triton, batch_invariant=True
)
rms_norm.implementation("invariant", reference, accepts=sums_alone, batch_invariant=on_the_host)
