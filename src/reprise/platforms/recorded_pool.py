"""Memory that recorded graphs share: a small allocator whose blocks die with their storages."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from reprise.platforms.borrow import StorageWeakRef, borrow_bytes

ALIGNMENT = 64
"""Of every block, as PyTorch's own CPU allocator aligns: kernels then take the same code path."""
CHUNK = 1 << 20

_orphans: list[tuple[StorageWeakRef, Tensor]] = []
"""Chunks of deleted pools that a tensor from their last capture still uses."""


class RecordedPool:
    """Memory of the intermediates of any number of recorded graphs.

    A block is in use while the storage that it was handed out for lives in Python, which is
    during capture; afterwards other captures take it. Graphs that share a pool therefore
    overwrite each other's intermediates and must not be replayed at the same time.
    """

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._starts: list[int] = []
        self._sizes: list[int] = []
        self._free: list[list[tuple[int, int]]] = []
        """Of each chunk: (offset, size) of its free blocks, ascending, never adjacent."""
        self._live: list[tuple[StorageWeakRef, int, int, int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes that the pool has taken from the system."""
        return sum(self._sizes)

    def memory(self) -> list[Tensor]:
        """All memory of the pool as uint8 tensors. No graph may rely on what they hold."""
        return list(self._chunks)

    def storage(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of ``nbytes`` in the pool. Its memory is free again when it dies."""
        size = max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)
        self._sweep()
        chunk, offset = self._take(size)
        tensor = borrow_bytes(self._starts[chunk] + offset, nbytes, self._chunks[chunk].device)
        storage = tensor.untyped_storage()
        self._live.append((StorageWeakRef(storage), chunk, offset, size))
        return storage

    def resident(self, tensor: Tensor) -> Tensor | None:
        """``tensor`` as a view of the pool's chunk that it lies in; None if it lies in none.

        The view keeps the chunk alive and leaves the block to the next allocation.
        """
        chunk = self._chunk_of(tensor)
        if chunk is None:
            return None
        storage = self._chunks[chunk].untyped_storage()
        offset = tensor.untyped_storage().data_ptr() - self._starts[chunk]
        offset += int(tensor.storage_offset()) * tensor.itemsize
        layout = offset // tensor.itemsize, tensor.size(), tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, *layout)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in the pool."""
        return self._chunk_of(tensor) is not None

    def _chunk_of(self, tensor: Tensor) -> int | None:
        address = tensor.untyped_storage().data_ptr()
        index = bisect.bisect_right(self._starts, address) - 1
        inside = index >= 0 and address < self._starts[index] + self._sizes[index]
        return index if inside else None

    def _sweep(self) -> None:
        """Take back the blocks whose storages have died."""
        alive = []
        for entry in self._live:
            if entry[0].expired():
                self._give_back(*entry[1:])
            else:
                alive.append(entry)
        self._live = alive
        if _orphans:
            _orphans[:] = [each for each in _orphans if not each[0].expired()]

    def _take(self, size: int) -> tuple[int, int]:
        """The smallest free block that fits, or one in a new chunk: (chunk, offset)."""
        best: tuple[int, int, int] | None = None
        for chunk, blocks in enumerate(self._free):
            for position, (_, free) in enumerate(blocks):
                if free >= size and (best is None or free < best[0]):
                    best = (free, chunk, position)
        if best is None:
            return self._grow(size), 0
        free, chunk, position = best
        offset, _ = self._free[chunk][position]
        if free == size:
            del self._free[chunk][position]
        else:
            self._free[chunk][position] = (offset + size, free - size)
        return chunk, offset

    def _grow(self, size: int) -> int:
        """A new chunk, its first ``size`` bytes taken; later chunks move up by one."""
        total = -(-size // CHUNK) * CHUNK
        with torch.inference_mode(False):
            memory = torch.empty(total, dtype=torch.uint8)
        chunk = bisect.bisect_left(self._starts, memory.data_ptr())
        self._starts.insert(chunk, memory.data_ptr())
        self._sizes.insert(chunk, total)
        self._chunks.insert(chunk, memory)
        self._free.insert(chunk, [(size, total - size)] if total > size else [])
        self._live = [
            (ref, at + (at >= chunk), offset, taken) for ref, at, offset, taken in self._live
        ]
        return chunk

    def _give_back(self, chunk: int, offset: int, size: int) -> None:
        blocks = self._free[chunk]
        position = bisect.bisect_left(blocks, (offset, 0))
        if position < len(blocks) and blocks[position][0] == offset + size:
            size += blocks.pop(position)[1]
        if position > 0 and sum(blocks[position - 1]) == offset:
            offset, size = blocks[position - 1][0], blocks[position - 1][1] + size
            blocks[position - 1] = (offset, size)
        else:
            blocks.insert(position, (offset, size))

    def __del__(self) -> None:
        _orphans.extend(
            (ref, self._chunks[chunk]) for ref, chunk, _, _ in self._live if not ref.expired()
        )
