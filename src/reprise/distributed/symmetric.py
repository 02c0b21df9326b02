"""Memory that every rank of a group reaches directly (``torch.distributed._symmetric_memory``)."""

from __future__ import annotations

import os
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
from reprise.distributed.numbered_store import NumberedStore

PROGRAMS = 512
"""Programs of a kernel that can push at the same time."""
SLOT_BYTES = (8 << 10) + 256
"""What one of them gets of each rank."""
NOTHING = -0x7FFF8000
"""A word of 32 bits that says that nothing has come yet: two zeros of 16 bits with a minus, or a
number of 32 that is next to nothing (-4.6e-41). Zeros are sent in its place."""
_END_BYTES = 16
"""Behind the slots: the word of ranks that have given up."""


class SymmetricBuffer:
    """One rank's part of the memory, and where the others' are.

    A program writes what it has into its slots of the others, waits until all that the others
    write has come into its own, and puts "nothing" back. Each has two sets of slots, used in turn:
    another rank writes into one again in its turn after the next, which it begins when it has got
    this rank's words of the next; those are sent by a kernel that runs behind the one that put
    "nothing" back. So in each turn a program hears each other rank. Numbers of turns only grow, on
    the device, so that a replayed graph goes on where the last call stood.

    Args:
        group: The ranks; each makes one at the same time.
        store: Through which they find each other.
        device: Of this rank.
    """

    def __init__(self, group: Group, store: Store, device: torch.device) -> None:
        self.group = group
        name: Any = f"{group.name}-symmetric"
        self._name = name
        # These kernels need no multicast, which torch would set up here.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._store = store = NumberedStore(store)
        # torch finds the store by either, which depends on its version.
        _SymmetricMemory.set_group_info(name, group.rank, group.size, store)
        self._found_by_name = dist.ProcessGroup(store, group.rank, group.size)
        _register_process_group(name, self._found_by_name)  # which keeps nothing alive
        nbytes = self.nbytes(group.size)
        self._own = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device, name)
        self.blank(self._own)
        self._handle = _SymmetricMemory.rendezvous(self._own)
        self.bases = torch.tensor(list(self._handle.buffer_ptrs), dtype=torch.int64, device=device)
        """[size]: addresses of every rank's slots: [2, PROGRAMS, size, SLOT_BYTES]."""
        self.turns = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        """[PROGRAMS]: that each program has had."""
        self.given_up = self._own[nbytes - _END_BYTES :][:4].view(torch.int32)
        """[1]: not 0: no rank is to wait any more."""
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=torch.accelerator.is_available())
        self._aside = torch.Stream(device=device)
        torch.accelerator.synchronize(device)

    @staticmethod
    def nbytes(size: int) -> int:
        """Bytes of a rank's part, where there are ``size`` of them."""
        return 2 * PROGRAMS * size * SLOT_BYTES + _END_BYTES

    @staticmethod
    def blank(memory: Tensor) -> None:
        """What a rank's part, [nbytes] uint8, holds before anybody pushes."""
        memory[:-_END_BYTES].view(torch.int32).fill_(NOTHING)
        memory[-_END_BYTES:].zero_()

    def give_up(self) -> None:
        """End all waits of this rank, from any thread: another rank is gone."""
        # A copy, and no kernel: those that were started early and wait for one that waits for the
        # other rank may have all multiprocessors.
        with self._aside:
            self.given_up.copy_(self._one, non_blocking=True)

    def close(self) -> None:
        """No rank pushes any more."""
        _unregister_process_group(self._name)
