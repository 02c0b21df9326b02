"""What a device offers, and what each op runs with, ready for JSON."""

from __future__ import annotations

from typing import Any

import torch

from reprise import ops as registry
from reprise.ops import Op, OpTable
from reprise.ops.cases import ShapeMaker
from reprise.ops.implementation import Implementation, anything
from reprise.platforms import Platform


def device_facts(platform: Platform) -> dict[str, Any]:
    """Name, memory in bytes, and what the platform declares of itself."""
    memory = platform.memory_info()
    return {
        "platform": platform.name,
        "device": str(platform.device),
        "name": platform.device_name,
        "count": type(platform).device_count(),
        "memory_free": memory.free,
        "memory_total": memory.total,
        "default_dtype": str(platform.default_dtype).removeprefix("torch."),
        "triton": platform.has_triton,
        "graphs": platform.has_graphs,
        "graph_memory": platform.graph_memory,
        "graph_memory_reason": platform.graph_memory_reason,
        "distributed": platform.dist_backend,
    }


def op_facts(table: OpTable) -> dict[str, Any]:
    """Of every op its implementations, the one that is wanted most, why others cannot be used, and
    what computes the calls for which the arguments decide: those that the table has met."""
    platform, chosen = table.platform, table.chosen
    return {
        name: {
            "chosen": chosen[name].name if name in chosen else None,
            "break_op": op.break_op,
            "mutates": list(op.mutates),
            "implementations": {
                each.name: {
                    "unusable": each.unusable(platform),
                    "on_request": each.on_request,
                    "refuses": refusals(op, each),
                    "graph_support": each.graph_support_on(platform),
                    "error": each.error,
                    "batch_invariant": each.batch_invariant_on(platform),
                }
                for each in op.implementations.values()
            },
            "calls": [
                {"call": e.call, "implementation": e.implementation.name, "refused": e.refused}
                for e in (table.choices[name].answers.values() if name in table.choices else ())
            ],
        }
        for name, op in sorted(registry.all_ops().items())
    }


def refusals(op: Op, implementation: Implementation) -> list[str]:
    """Why it does not compute some of the op's cases: each reason once, with a call that met it."""
    if implementation.accepts is anything:
        return []
    make = ShapeMaker(torch.bfloat16)
    calls = [("a small one", each) for each in op.cases.small(make)]
    calls += [(each.shape, each.arguments()) for each in op.cases.workloads(make)]
    reasons: dict[str, str] = {}
    for shape, arguments in calls:
        reason = implementation.refusal(**arguments)
        if reason is not None:
            reasons.setdefault(reason, shape)
    return [f"{reason} ({shape})" for reason, shape in reasons.items()]
