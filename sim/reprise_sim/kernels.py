"""The device's own kernels: each op of Reprise is one launch, as it is on other accelerators.

A worker runs what the CPU would, over the same bytes; lengths and tables are read when it runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from reprise import ops, platforms
from reprise.ops import Op, OpTable
from reprise.ops.implementation import Implementation
from reprise.platforms import Platform
from reprise_sim import device


def _only_here(platform: Platform) -> str | None:
    return None if platform.device_type == "sim" else "it is a kernel of the device sim"


@functools.cache
def _invariant_table() -> OpTable:
    return OpTable(platforms.load("cpu")(), batch_invariant=True)


def _invariant_ones(op: Op) -> list[Implementation]:
    """The CPU's batch-invariant implementations; those that Triton interprets are for its tests."""
    table = _invariant_table()
    table.functions[op.name]  # chooses, if the op was declared after the table was made
    return [each for each in table.candidates[op.name] if not each.compiles]


def _has_invariant(op: Op, platform: Platform) -> str | None:
    reason = _only_here(platform)
    if reason is None and not _invariant_ones(op):
        return "the CPU has no batch-invariant implementation"
    return reason


def _takes(op: Op, **arguments: Any) -> str | None:
    reasons = [each.refusal(**arguments) for each in _invariant_ones(op)]
    return None if None in reasons else "; ".join(map(str, reasons))


def _kernel(op: Op, *, batch_invariant: bool = False) -> Callable[..., Any]:
    """An implementation of ``op`` that queues the CPU's."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        result = op.fake(*args, **kwargs)
        outputs = _tensors(result)
        names, given = tuple(kwargs), [*args, *kwargs.values()]
        changed = {id(each) for each in op.written(op.named(args, kwargs)).values()}
        written = [place for place, each in enumerate(given) if id(each) in changed]
        written += range(len(given), len(given) + len(outputs))

        # And not `given`: a graph would keep all tensors that it uses.
        positional, count = len(args), len(given)

        def compute(*host: Any) -> None:
            named = dict(zip(names, host[positional:count], strict=True))
            invariant = _invariant_table().activate() if batch_invariant else None
            with invariant or contextlib.nullcontext():
                found = _tensors(op(*host[:positional], **named))
            for target, source in zip(host[count:], found, strict=True):
                target.copy_(source)

        device.launch(op.name, compute, [*given, *outputs], written)
        return result

    return launch


def _tensors(result: Any) -> list[Tensor]:
    """An op returns none, one, or several, some of which may be left out."""
    several = result if isinstance(result, tuple | list) else (result,)
    return [each for each in several if isinstance(each, Tensor)]


for _op in ops.all_ops().values():
    _op.implementation("sim", _kernel(_op), requires=_only_here)
    _op.implementation(
        "sim_invariant",
        _kernel(_op, batch_invariant=True),
        requires=functools.partial(_has_invariant, _op),
        accepts=functools.partial(_takes, _op),
        batch_invariant=True,
    )
