"""Wrong ways to depend on other rows, as kernels do: for tests that compare bits.

Each takes what computes an op right, and the arguments by name, and changes the last bit of some
rows, by what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from reprise.ops.registry import Op

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
WrongRows = Callable[[int], slice]
"""Of so many tokens, those that are changed."""


def other_kernel_for_many(count: int) -> slice:
    """Batches of more than four tokens are summed in another order."""
    return slice(None) if count > 4 else slice(0)


def other_kernel_for_one(count: int) -> slice:
    """A token that comes alone is computed by a product of a matrix and a vector."""
    return slice(None) if count == 1 else slice(0)


def other_code_at_the_end(count: int) -> slice:
    """What is left behind the last full vector is computed by other code: of an even number of
    tokens nothing."""
    return slice(count - count % 2, None)


WRONG_ROWS = (other_kernel_for_many, other_kernel_for_one, other_code_at_the_end)


def depending(op: Op, implementation: str, fault: WrongRows) -> Callable[..., Any]:
    """An implementation of ``op`` that computes as the one of that name, and has the fault."""
    right = op.implementations[implementation].function

    def compute(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        named = op.named(args, kwargs)
        changed = fault(len(named[op.rows[0]]))
        for each in _outputs(op, named, result):
            bits = _BITS[each.element_size()]
            some = each[changed].contiguous()
            each[changed] = (some.view(bits) ^ 1).view(each.dtype)
        return result

    return compute


def _outputs(op: Op, named: dict[str, Any], result: Any) -> Iterator[Tensor]:
    """What has a row for each token."""
    if isinstance(result, Tensor):
        yield result
    for name, each in op.written(named).items():
        if name in op.rows:
            yield each
