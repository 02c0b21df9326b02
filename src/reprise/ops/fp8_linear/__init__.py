"""Products whose weights and activations have eight bits, with a scale for each block."""

from reprise.ops.fp8_linear.cases import cases
from reprise.ops.fp8_linear.reference import fake, reference
from reprise.ops.registry import op

fp8_linear = op("fp8_linear", reference, cases=cases, fake=fake)
