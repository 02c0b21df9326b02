"""What a device offers, and what each op runs with, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise import ops as registry
from reprise.ops.registry import Implementation
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


def op_facts(platform: Platform, chosen: Mapping[str, Implementation]) -> dict[str, Any]:
    """Of every op its implementations, the one in use, and why others cannot be.

    Args:
        platform: Where.
        chosen: The implementation of each op that is in use.
    """
    return {
        name: {
            "chosen": chosen[name].name,
            "break_op": op.break_op,
            "mutates": list(op.mutates),
            "implementations": {
                each.name: {
                    "unusable": each.unusable(platform),
                    "graph_support": each.graph_support_on(platform),
                    "error": each.error,
                }
                for each in op.implementations.values()
            },
        }
        for name, op in sorted(registry.all_ops().items())
    }
