"""Inputs of ops: small ones to compare on, and those of real models to time and to compile.

Every op has some (``op(..., cases=...)``). The conformance kit, the op tests, the benchmark of
kernels and the test that compiles them for absent devices read them from its declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
"""Of one call, by name."""
EPS = 1e-6
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int = 151936

    @property
    def projected(self) -> int:
        """Width of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def products(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a layer's products, in the order in which it computes them."""
        return [
            (self.projected, self.hidden),
            (self.hidden, self.heads * self.head_size),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]


SMALL = Dimensions("0.6B", 1024, 16, 8, 128, 3072)
LARGE = Dimensions("8B", 4096, 32, 8, 128, 12288)
"""Qwen3's."""


class Maker:
    """Tensors for cases: random, but the same each time and on every device.

    Args:
        device: Where they lie.
        dtype: What a model would compute in.
        fp8: What eight-bit codes of a cache are; None: the device has none.
        models: Whose sizes workloads have.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        fp8: torch.dtype | None = torch.float8_e4m3fn,
        models: Sequence[Dimensions] = (SMALL, LARGE),
    ) -> None:
        self.device, self.dtype, self.fp8, self.models = device, dtype, fp8, models
        self._generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, in the compute dtype unless told otherwise."""
        values = torch.randn(shape, generator=self._generator)
        return values.to(self.device, dtype or self.dtype)

    def ints(self, values: Iterable[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)

    def floats(self, *values: float) -> Tensor:
        """float32, whatever the compute dtype is."""
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def full(self, count: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=self.device)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from 0 to ``high - 1``."""
        values = torch.randint(high, shape, generator=self._generator, dtype=dtype)
        return values.to(self.device)

    def permutation(self, count: int) -> Tensor:
        """[count] int64: the numbers below ``count`` in disorder."""
        return torch.randperm(count, generator=self._generator).to(self.device)


class ShapeMaker(Maker):
    """Makes tensors without memory, for callers that look at shapes alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(torch.device("meta"), dtype)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def randint(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Workload:
    """One call as a model makes it."""

    shape: str
    """For people: the model and what the step is."""
    arguments: Callable[[], Arguments]
    """Makes the inputs anew."""
    read_write: int = 0
    """Bytes that any implementation must move; 0: the call is bound by what it computes."""
    operations: int = 0
    """Floating-point operations that any implementation must do; 0: bound by memory."""
    exact: bool = False
    """Its results are whole numbers."""
    compiled: bool = False
    """It is compiled for devices that are not there. Between them such workloads need every kernel
    of the op, as large as it gets."""


def none(make: Maker) -> Sequence[Workload]:
    return ()


@dataclass(frozen=True)
class Cases:
    """The inputs of one op."""

    small: Callable[[Maker], Sequence[Arguments]]
    """What implementations are compared on: every path that a caller can take, tensors of up to
    some thousand elements. None for a compute dtype that makes no difference."""
    workloads: Callable[[Maker], Iterable[Workload]] = none
    """What kernels are timed on, and compiled for."""
    coded_between: bool = False
    """What a first part gives is rounded to eight bits before a second one takes it. Where sums of
    another order round to the next number of 16 bits, the code may be the next one."""
