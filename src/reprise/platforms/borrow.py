"""Tensors that use memory without owning it, and a way to see that a storage has died."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["StorageWeakRef", "borrow", "borrow_bytes", "storage_key"]


def storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's storage, valid while the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def borrow_bytes(address: int, nbytes: int, device: torch.device) -> Tensor:
    """[nbytes] uint8 over memory that the caller keeps alive."""
    return _over(address, nbytes, device, torch.uint8, 0, (nbytes,), (1,))


def borrow(tensor: Tensor) -> Tensor:
    """The same elements in a tensor that does not keep their storage alive.

    The caller knows that the memory outlives the result, because a graph's pool holds it.
    """
    storage = tensor.untyped_storage()
    return _over(
        storage.data_ptr(),
        storage.nbytes(),
        tensor.device,
        tensor.dtype,
        int(tensor.storage_offset()),
        tuple(tensor.size()),
        tensor.stride(),
    )


def _over(
    address: int,
    nbytes: int,
    device: torch.device,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    # Private, but in every build of torch from 2.1 on (its own graph trees rely on it), for any
    # device; a test checks that it is there.
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    empty = torch.empty(0, dtype=dtype, device=device)
    return empty.set_(storage, offset, size, stride)
