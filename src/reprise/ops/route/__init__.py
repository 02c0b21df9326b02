from reprise.ops.registry import needs_triton, op
from reprise.ops.route.cases import cases
from reprise.ops.route.reference import reference

route = op("route", reference, cases=cases, mutates=("weights", "ids"))
route.implementation("triton", "reprise.ops.route.triton:route", requires=needs_triton)
