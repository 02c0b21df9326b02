from reprise.ops.grouped_output.cases import cases
from reprise.ops.grouped_output.reference import fake, reference
from reprise.ops.registry import op

grouped_output = op("grouped_output", reference, cases=cases, fake=fake)
