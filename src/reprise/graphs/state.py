"""What a step may change: the computation's state and what ops keep from call to call."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reprise.graphs.compare import copies
from reprise.graphs.computation import Computation
from reprise.graphs.shape import StepShape
from reprise.ops.registry import OpTable


def memory_of_ops(table: OpTable) -> dict[str, Tensor]:
    """What the implementations in use keep from call to call, by name."""
    return {f"memory of ops ({key})": tensor for key, tensor in table.memory.items()}


class StepState:
    """The state that the current inputs would write, and the memory of ops.

    A graph that leaves the memory of ops in disorder spoils the steps after it, eager ones too:
    so it is compared like any result, and put back.

    Args:
        computation: Its inputs hold a step.
        live: The real rows.
    """

    def __init__(self, computation: Computation, live: StepShape) -> None:
        self._state = computation.state(live)
        self._memory = memory_of_ops(computation.ops)

    def read(self) -> dict[str, Tensor]:
        """Copies of the tensors, by name."""
        return {**self._state.read(), **copies(self._memory)}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`read` returned."""
        self._state.write({k: v for k, v in values.items() if k not in self._memory})
        for name, tensor in self._memory.items():
            tensor.copy_(values[name])
