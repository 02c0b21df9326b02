"""The device's own kernels: each op of Reprise is one launch, as it is on other accelerators.

A worker runs what the CPU would, over the same bytes; lengths and tables are read when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from reprise import ops
from reprise.ops import Op
from reprise.platforms import Platform
from reprise_sim import device


def _only_here(platform: Platform) -> str | None:
    return None if platform.device_type == "sim" else "it is a kernel of the device sim"


def _kernel(op: Op) -> Callable[..., Any]:
    """An implementation of ``op`` that queues the CPU's."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        result = op.fake(*args, **kwargs)
        outputs = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        named = op.named(args, kwargs)
        given, structure = tree_flatten((args, kwargs))
        changed = {id(each) for each in op.written(named).values()}
        written = [place for place, each in enumerate(given) if id(each) in changed]
        written += range(len(given), len(given) + len(outputs))

        count = len(given)  # and not `given`: a graph would keep all tensors that it uses

        def compute(*host: Any) -> None:
            args, kwargs = tree_unflatten(list(host[:count]), structure)
            found = tree_flatten(op(*args, **kwargs))[0]
            for target, source in zip(host[count:], found, strict=False):
                target.copy_(source)

        device.launch(op.name, compute, [*given, *outputs], written)
        return result

    return launch


for _op in ops.all_ops().values():
    _op.implementation("sim", _kernel(_op), requires=_only_here)
