"""A device without a device: its tensors have sizes and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from reprise import platforms
from reprise.graphs import Computation
from reprise.ops.registry import intercept
from reprise.platforms import MemoryInfo, Platform
from reprise.platforms.host_queue import HostStream
from reprise.shape import StepShape

META = torch.device("meta")


class OnPaper(Platform):
    """What the parts of an engine ask a platform, answered without a device."""

    known: MemoryInfo
    """Of the device."""
    used: int
    """Bytes that the engine holds."""


def on_paper(device: str, memory: int | None) -> OnPaper:
    """A platform like ``device`` whose tensors have no memory.

    Args:
        device: As in the options.
        memory: Bytes of a device that need not be here; None: as the one that is here says.

    Raises:
        PlatformError: The device is unknown, or is not here and ``memory`` is None.
    """
    name = device.partition(":")[0]
    here: Platform | None = None
    if memory is None or name == "auto":
        here = platforms.resolve(device)
        here.activate()
    kind = platforms.load(name) if here is None else type(here)
    info = here.memory_info() if memory is None and here is not None else None
    known = info or MemoryInfo(memory or 0, memory or 0)

    class Paper(kind, OnPaper):  # type: ignore[misc, valid-type]
        asynchronous = False
        pins_memory = False
        used = 0

        @property
        def device(self) -> torch.device:
            return META

        @property
        def fp8_dtype(self) -> torch.dtype | None:  # type: ignore[override]
            # Whichever it has, it is as large.
            return torch.float8_e4m3fn if here is None else here.fp8_dtype

        @property
        def default_dtype(self) -> torch.dtype:
            return torch.bfloat16 if here is None else here.default_dtype

        def supports_dtype(self, dtype: torch.dtype) -> bool:
            if here is None:
                return Platform.supports_dtype(self, dtype)
            return here.supports_dtype(dtype)

        def activate(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def current_stream(self) -> HostStream:
            return HostStream()

        def memory_info(self) -> MemoryInfo:
            return MemoryInfo(max(0, known.free - self.used), known.total)

        def memory_allocated(self) -> int:
            return 0

        def memory_reserved(self) -> int:
            return 0

        def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=META)

    Paper.known = known
    return Paper(0)


def peak_of(computation: Computation, shape: StepShape) -> int:
    """Most bytes that the results of a step's operations take at once."""

    def fake(op: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return op.fake(*args, **kwargs)

    with computation.ops.activate(), intercept(fake), _Peak() as peak:
        computation.forward(shape, computation.model)
    return peak.most


class _Peak(TorchDispatchMode):
    """Counts the memory that is made inside and still held."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        for each in _tensors(result):
            storage = each.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._live:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._live[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._live.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in tree_flatten(tree)[0] if isinstance(each, Tensor)]
