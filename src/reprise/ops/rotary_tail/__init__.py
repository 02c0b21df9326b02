from reprise.ops.registry import op
from reprise.ops.rotary_tail.cases import cases
from reprise.ops.rotary_tail.reference import fake, reference

rotary_tail = op("rotary_tail", reference, cases=cases, extent="positions", fake=fake)
