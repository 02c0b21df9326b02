"""Where tensors lie, those without memory too."""

from __future__ import annotations

from torch import Tensor


def address_of(tensor: Tensor) -> int:
    """The address of its first byte. A tensor on the device ``meta``, which has none, has one all
    the same: as if its storage had memory, far from that of any other storage."""
    if not tensor.is_meta:
        return tensor.data_ptr()
    return (tensor.untyped_storage()._cdata << 64) + tensor.storage_offset() * tensor.itemsize
