"""Memory that ranks reach, without a device that has any."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch._C._distributed_c10d import HashStore, PrefixStore, _resolve_process_group

from reprise.distributed import Group, symmetric
from reprise.distributed.numbered_store import NumberedStore
from reprise.distributed.symmetric import SymmetricBuffer


def test_torch_finds_the_ranks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it exchanges addresses, which it does by the group of that name, and no longer than the
    memory is there: what torch is told of it keeps nothing alive."""
    found = []

    class Memory:
        set_group_info = staticmethod(lambda *what: None)

        @staticmethod
        def empty_strided_p2p(size: tuple[int], *what: object) -> torch.Tensor:
            return torch.empty(size, dtype=torch.uint8)

        @staticmethod
        def rendezvous(memory: torch.Tensor) -> SimpleNamespace:
            gc.collect()
            ranks = _resolve_process_group("ranks-symmetric")
            found.append((ranks.rank(), ranks.size()))
            return SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * 2)

    monkeypatch.setattr(symmetric, "_SymmetricMemory", Memory)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    buffer = SymmetricBuffer(Group("ranks", 1, 2), HashStore(), torch.device("cpu"))
    assert found == [(1, 2)]
    assert not buffer.given_up.any()
    buffer.give_up()
    assert buffer.given_up.all()
    buffer.close()
    with pytest.raises(RuntimeError, match="ranks-symmetric"):
        _resolve_process_group("ranks-symmetric")


def test_ranks_meet_though_one_process_has_exchanged_before() -> None:
    """torch numbers what a process exchanges: 7 and 9 in one that has made engines, 0 and 1 in
    another, which was started for this one."""
    shared = HashStore()
    stores = [NumberedStore(shared) for _ in range(2)]
    ranks = [PrefixStore("", each) for each in stores]  # as torch asks, not as Python does
    for number, (ours, theirs) in enumerate(((7, 0), (9, 1), (10, 2))):
        names = [[f"Memory/{each}/{rank}" for rank in range(2)] for each in (ours, theirs)]
        for rank, store in enumerate(ranks):
            store.set(names[rank][rank], bytes([255, rank, number]))
        expected = [bytes([255, rank, number]) for rank in range(2)]
        assert [store.multi_get(names[rank]) for rank, store in enumerate(ranks)] == [expected] * 2
