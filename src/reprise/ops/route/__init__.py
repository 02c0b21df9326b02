from reprise.ops.registry import op
from reprise.ops.route.cases import cases
from reprise.ops.route.reference import reference

route = op("route", reference, cases=cases, mutates=("weights", "ids"))
