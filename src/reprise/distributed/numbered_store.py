"""A store for exchanges that torch numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

_NUMBER = re.compile(r"(?<=/)\d+(?=/|$)")


class NumberedStore(Store):
    """Begins to count anew.

    ``torch.distributed._symmetric_memory`` names what ranks exchange by its number among all
    exchanges of a process. A process that makes its second engine is further than those that were
    started for it, and each would wait for what the other calls otherwise. Here the first number
    that comes is 0 for every rank, the next other one 1, and so on.

    Args:
        store: Through which the ranks find each other; of one group.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._numbers: dict[str, int] = {}

    def _key(self, key: str) -> str:
        def counted(found: re.Match[str]) -> str:
            return str(self._numbers.setdefault(found[0], len(self._numbers)))

        return _NUMBER.sub(counted, key, count=1)

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._key(key))

    def add(self, key: str, value: int) -> int:
        return self._store.add(self._key(key), value)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check([self._key(each) for each in keys])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        ours = [self._key(each) for each in keys]
        self._store.wait(ours) if timeout is None else self._store.wait(ours, timeout)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._store.multi_get([self._key(each) for each in keys])

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(self._key(key))
