"""One rank of a sum over shared memory, its kernel run by Triton's interpreter."""

from __future__ import annotations

import mmap
import sys
import time

import interpreter
import numpy as np
import torch

from reprise.distributed import Group
from reprise.distributed.symmetric import PROGRAMS, SymmetricBuffer
from reprise.ops.all_gather.triton import push_beside, words_of
from reprise.ops.all_reduce.triton import PART, norms, push, push_norm
from reprise.ops.rms_norm.reference import reference as rms_norm

interpreter.quicken()

SIZES = (3, 2100, 8)
"""Elements, of grids that differ from sum to sum."""
ROWS = ((1, PART), (3, 96), (2, PART + 40))
"""Rows and their elements, of which a program has one: through a slot, through a part of one, and
through two."""
COLUMNS = ((1, 700, 1400), (3, 40, 75))
"""Rows, columns of a rank, and those that are wanted."""


class Shared(SymmetricBuffer):
    """Every rank's memory in one mapping of a file that all have."""

    def __init__(self, group: Group, file: int) -> None:
        self.group = group
        nbytes = self.nbytes(group.size)
        mapped = np.frombuffer(mmap.mmap(file, nbytes * group.size), dtype=np.uint8)
        self._own = torch.from_numpy(mapped)
        base = self._own.data_ptr()
        self.bases = torch.tensor([base + nbytes * rank for rank in range(group.size)])
        self.turns = torch.zeros(PROGRAMS, dtype=torch.int32)
        self.given_up = torch.zeros(1, dtype=torch.int32)


def parts(size: int, turn: int, count: int) -> list[torch.Tensor]:
    """What each rank adds."""
    numbers = torch.Generator().manual_seed(1000 * turn + count)
    return [torch.randn(count, generator=numbers) for _ in range(size)]


def main() -> None:
    rank, size, file = map(int, sys.argv[1:])
    buffer = Shared(Group("sum", rank, size), file)
    for turn in range(3):
        for count in SIZES:
            if turn % size == rank:
                time.sleep(0.05)  # one is late
            all_parts = parts(size, turn, count)
            total = torch.zeros(count)
            for each in all_parts:
                total += each
            residual = torch.ones(count)
            push(buffer, all_parts[rank].clone(), residual, add=True)
            assert torch.equal(residual, 1 + total), (turn, count)
            x = all_parts[rank].clone()
            push(buffer, x, x, add=False)
            assert torch.equal(x, total), (turn, count)
        for rows, count in ROWS:
            all_parts = [each.view(rows, count) for each in parts(size, turn, rows * count)]
            total = torch.zeros(rows, count)
            for each in all_parts:
                total += each
            residual = torch.full((rows, count), 0.5)
            gain = torch.linspace(0.5, 1.5, count)
            own = all_parts[rank].clone()
            assert norms(own, residual)
            out = push_norm(buffer, own, residual, gain, 1e-6)
            assert torch.equal(residual, 0.5 + total), (turn, count)
            torch.testing.assert_close(out, rms_norm(0.5 + total, gain, 1e-6))
        for rows, count, columns in COLUMNS:
            all_parts = [each.view(rows, count) for each in parts(size, turn, rows * count)]
            out = torch.full((rows, columns + 4), 7.0)[:, :columns]
            block = words_of(all_parts[rank], out)
            assert block
            push_beside(buffer, all_parts[rank], out, block)
            assert torch.equal(out, torch.cat(all_parts, 1)[:, :columns]), (turn, count)
    assert int(buffer.turns[0]) == 3 * (2 * len(SIZES) + len(ROWS) + len(COLUMNS))


if __name__ == "__main__":
    main()
