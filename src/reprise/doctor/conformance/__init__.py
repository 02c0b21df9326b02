"""The contract that every platform must meet, tried on one.

Each contract is a small function whose docstring is its text, so the modules here are the
platform's specification: :mod:`order <reprise.doctor.conformance.order>`, ``graphs``,
``memory``, ``collectives``, ``operations``, ``engine``.
"""

from reprise.doctor.conformance import (  # noqa: F401, I001 - in the order of the report
    order,
    memory,
    graphs,
    collectives,
    operations,
    invariance,
    engine,
)
from reprise.doctor.conformance.contract import CONTRACTS, Broken, Contract, Kit, Skipped
from reprise.doctor.conformance.run import Conformance, Outcome, attempts, conformance, select

__all__ = [
    "CONTRACTS",
    "Broken",
    "Conformance",
    "Contract",
    "Kit",
    "Outcome",
    "Skipped",
    "attempts",
    "conformance",
    "select",
]
