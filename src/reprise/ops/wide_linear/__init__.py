from reprise.ops.registry import op
from reprise.ops.wide_linear.cases import cases
from reprise.ops.wide_linear.reference import fake, reference

wide_linear = op("wide_linear", reference, cases=cases, fake=fake)
