"""Memory that ranks reach, without a device that has any."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch._C._distributed_c10d import HashStore, _resolve_process_group

from reprise.distributed import Group, symmetric
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
