from reprise.ops.kv_insert.cases import cases
from reprise.ops.kv_insert.reference import reference
from reprise.ops.registry import op

kv_insert = op(
    "kv_insert", reference, cases=cases, mutates=("cache",), extent="positions", state=("cache",)
)
