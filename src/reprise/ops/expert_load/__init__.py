"""How many rows each expert gets."""

from reprise.ops.expert_load.cases import cases
from reprise.ops.expert_load.reference import reference
from reprise.ops.registry import op

expert_load = op("expert_load", reference, cases=cases, mutates=("counts",), state=("counts",))
