"""Streams made one again behind the last sublayer."""

from reprise.ops.hyper_head.cases import cases
from reprise.ops.hyper_head.reference import fake, reference
from reprise.ops.registry import op

hyper_head = op("hyper_head", reference, cases=cases, mutates=("streams",), fake=fake)
