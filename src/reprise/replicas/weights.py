"""New weights for replicas: written once, into memory without a name, of which every replica is
handed a descriptor. Nothing of it stays when its last process has ended, however that ends."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from reprise.errors import LoadError

ALIGNMENT = 64

Index = list[tuple[str, str, tuple[int, ...], int]]
"""Name, dtype, shape and offset of each tensor."""


def write_weights(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> tuple[BinaryIO, Index]:
    """All tensors in a file without a name, which the caller closes.

    Raises:
        LoadError: What was given is no named tensor.
    """
    file = _nameless()
    index: Index = []
    try:
        for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise LoadError(f"weights has {name!r}: {type(tensor)}; give names and tensors")
            file.write(bytes(-file.tell() % ALIGNMENT))
            index.append((name, str(tensor.dtype), tuple(tensor.shape), file.tell()))
            here = tensor.detach().to("cpu").contiguous()
            file.write(here.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file, index


def read_weights(descriptor: int, index: Index) -> dict[str, Tensor]:
    """The tensors, which lie in the file. It is closed when they are gone."""
    try:
        size = os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) if size else None
    finally:
        os.close(descriptor)
    found: dict[str, Tensor] = {}
    for name, kind, shape, offset in index:
        dtype: torch.dtype = getattr(torch, kind.removeprefix("torch."))
        count = torch.Size(shape).numel()
        values: Any = torch.empty(0, dtype=dtype)
        if count:
            assert memory is not None
            values = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        found[name] = values.reshape(shape)
    return found


def _nameless() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("reprise-weights"), "wb+")
    return tempfile.TemporaryFile()
