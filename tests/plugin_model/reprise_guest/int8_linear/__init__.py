from reprise.ops.registry import op
from reprise_guest.int8_linear.cases import cases
from reprise_guest.int8_linear.reference import fake, reference

int8_linear = op("int8_linear", reference, cases=cases, fake=fake)
int8_linear.implementation("scaled", "reprise_guest.int8_linear.scaled:int8_linear")
