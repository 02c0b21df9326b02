"""Host memory in which tensors lie side by side, on the largest pages that the system gives.

A step of few rows reads every weight once. On pages of 4 KiB it waits for the translation of
addresses too: a tenth of the time and more. The system gives large pages only where a stretch of
their size is all one mapping and has not been touched, which tensors that are allocated one by one
are not: the allocator writes its notes between them.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ALIGNMENT = 64
"""Of every tensor, as PyTorch's own CPU allocator aligns."""
LEAST = 1 << 23
"""Bytes from which it is worth a mapping: some large pages."""
_TAKEN = {"size", "dtype", "device"}
"""Arguments of ``torch.empty``; tensors with others, such as a layout, are no plain rows."""


class LargePages(TorchFunctionMode):
    """Tensors that ``torch.empty`` makes on the CPU in the ``with`` block lie in one mapping.

    It lives as long as one of them. What does not fit, or is no plain tensor, is allocated as ever.

    Args:
        nbytes: What they take, together.
        count: How many there are.

    Raises:
        MemoryError: There is not so much.
    """

    def __init__(self, nbytes: int, count: int) -> None:
        super().__init__()
        try:
            self._memory = mmap.mmap(
                -1, nbytes + count * ALIGNMENT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            raise MemoryError(f"{nbytes / 2**30:.2f} GiB cannot be had: {error}") from error
        with contextlib.suppress(OSError):  # a kernel that was built without them has small ones
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._taken = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.keys() <= _TAKEN and _on_the_host(kwargs.get("device")):
            wanted = func(*args, **{**kwargs, "device": "meta"})
            begin = -(-self._taken // ALIGNMENT) * ALIGNMENT
            if 0 < wanted.nbytes <= len(self._memory) - begin:
                self._taken = begin + wanted.nbytes
                return self._at(begin, wanted)
        return func(*args, **kwargs)

    def _at(self, begin: int, like: Tensor) -> Tensor:
        found = torch.frombuffer(
            self._memory, dtype=torch.uint8, offset=begin, count=like.nbytes
        ).view(like.dtype)
        return found.view(like.shape)


def _on_the_host(device: Any) -> bool:
    return torch.device(torch.get_default_device() if device is None else device).type == "cpu"


def available() -> bool:
    """Whether the system knows of them."""
    return hasattr(mmap, "MADV_HUGEPAGE")
