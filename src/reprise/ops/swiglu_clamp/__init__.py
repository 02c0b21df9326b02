from reprise.ops.registry import op
from reprise.ops.swiglu_clamp.cases import cases
from reprise.ops.swiglu_clamp.reference import fake, reference

swiglu_clamp = op("swiglu_clamp", reference, cases=cases, fake=fake)
