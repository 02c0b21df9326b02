"""``reprise doctor``: what this machine offers and what Reprise makes of it.

A further report is one more file here with a function ``register``.
"""

from __future__ import annotations

from reprise.cli.doctor import collectives, conformance, graphs, machine, memory, ops, report
from reprise.cli.doctor.group import app

machine.register(app)
ops.register(app)
graphs.register(app)
conformance.register(app)
memory.register(app)
collectives.register(app)
report.register(app)

__all__ = ["app"]
