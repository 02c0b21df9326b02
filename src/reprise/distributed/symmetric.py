"""Memory that every rank of a group can read directly (``torch.distributed._symmetric_memory``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    Store,
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)

from reprise.distributed.group import Group

BLOCKS = 32
"""Programs that share a sum at most. All of them run at once, since they wait for each other."""
STAGE_BYTES = 32 << 10
"""What each of them can put down for the others, of which it has two places that take turns."""
PROGRAMS = 512
"""Programs that push words at most."""
SLOT_BYTES = (8 << 10) + 256
"""What one of them gets of each rank."""
FLAGS = 2 * BLOCKS * STAGE_BYTES
NOTHING = -0x7FFF8000
"""A word of 32 bits that says that nothing has come yet: two zeros of 16 bits with a minus, or a
number of 32 that is next to nothing (-4.6e-41). Zeros are sent in its place."""


class SymmetricBuffer:
    """One rank's part of the memory, and where the others' are.

    Programs put down what they have, tell the others, wait until all have told, and read. Each has
    its own two places, used in turn: before it overwrites what it put down two sums ago, every
    other rank has told that it is one sum further, and has therefore read it. Numbers of turns only
    grow, on the device, so that a replayed graph goes on where the last call stood.

    Args:
        group: Who; every rank makes one at the same time.
        store: Through which they find each other.
        device: Of this rank.
    """

    def __init__(self, group: Group, store: Store, device: torch.device) -> None:
        self.group = group
        name: Any = f"{group.name}-symmetric"
        self._name = name
        # torch finds the store by either, which depends on its version.
        _SymmetricMemory.set_group_info(name, group.rank, group.size, store)
        _register_process_group(name, dist.ProcessGroup(store, group.rank, group.size))
        self.flags = FLAGS
        """Bytes from the beginning to the turns that others have told: [BLOCKS, size] int32."""
        self.slots = self.slots_of(group.size)
        """Bytes from the beginning to what others push: [2, PROGRAMS, size, SLOT_BYTES]."""
        nbytes = self.nbytes(group.size)
        self._own = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device, name)
        self.blank(self._own, group.size)
        self._handle = _SymmetricMemory.rendezvous(self._own)
        self.bases = torch.tensor(list(self._handle.buffer_ptrs), dtype=torch.int64, device=device)
        """[size]: addresses of every rank's memory."""
        self.turns = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
        """[BLOCKS]: sums that each program has begun."""
        self.pushes = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        """[PROGRAMS]: likewise, of words that are pushed."""
        self.given_up = self._own[self.flags + 4 * BLOCKS * group.size :][:4].view(torch.int32)
        """[1]: not 0: nobody is to wait any more."""
        torch.accelerator.synchronize(device)

    @staticmethod
    def slots_of(size: int) -> int:
        """See :attr:`slots`."""
        return FLAGS + 4 * (BLOCKS * size + 4)

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Of a rank's part, where there are ``size`` of them."""
        return cls.slots_of(size) + 2 * PROGRAMS * size * SLOT_BYTES

    @classmethod
    def blank(cls, memory: Tensor, size: int) -> None:
        """What a rank's part holds before the first sum; memory: [nbytes] uint8."""
        memory.zero_()
        memory[cls.slots_of(size) :].view(torch.int32).fill_(NOTHING)

    def give_up(self) -> None:
        """Let nobody here wait any more, from any thread: another rank is gone."""
        stream = torch.Stream(device=self._own.device)
        with stream:
            self.given_up.fill_(1)

    def close(self) -> None:
        """Nobody sums here any more."""
        _unregister_process_group(self._name)

    def takes(self, x: Tensor) -> bool:
        """Whether a sum of such tensors fits."""
        return (
            x.is_contiguous()
            and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and 0 < x.nbytes <= BLOCKS * STAGE_BYTES // 2
        )
