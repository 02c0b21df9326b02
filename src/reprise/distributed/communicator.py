"""Sums and concatenations over the ranks of a group, through ``torch.distributed``.

Process groups are made here and known to nobody else: the default group of ``torch.distributed``
stays the user's, and one process may have several engines.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    PrefixStore,
    ReduceScatterOptions,
    Store,
)

from reprise.distributed.group import ALONE, ECHO, Group
from reprise.distributed.symmetric import SymmetricBuffer
from reprise.errors import PlatformError, describe

logger = logging.getLogger(__name__)

_known: dict[str, Communicator] = {}
_leaving: list[threading.Thread] = []
LEAVE_SECONDS = 5.0
"""For so long a process that ends waits for groups that are being left."""


class Communicator:
    """How the ranks of a group exchange tensors. Collectives are called in the same order, with the
    same shapes, on every rank.

    Args:
        group: The ranks.
        process_group: A ``torch.distributed`` backend's group; None: there is one rank.
        device: That this rank computes on.
        store: Through which the ranks find each other.
    """

    def __init__(
        self,
        group: Group,
        process_group: Any = None,
        device: torch.device | None = None,
        store: Store | None = None,
    ) -> None:
        self.group = group
        self._group = process_group
        self._device, self._store = device, store
        self.symmetric: SymmetricBuffer | None = None
        """Memory that all ranks read directly; None: there is none, or it is not wanted."""
        self.calls = 0
        """Collectives that this rank has begun."""
        self.told: Callable[[int], None] = lambda calls: None
        """Called with their number at each, so that others can see where this rank stands."""
        self.unreached = "it was not asked for"
        """Why :attr:`symmetric` is None, where it is."""

    def begin(self) -> None:
        """A collective of this rank begins."""
        self.calls += 1
        self.told(self.calls)

    def all_reduce(self, x: Tensor) -> None:
        """Replace ``x`` by the sum of all ranks' ``x``: the same bits on every rank."""
        if self._group is None:
            return
        self.begin()
        options = AllreduceOptions()
        options.asyncOp = False  # in the stream that waits for it, where the backend has streams
        _finish(self._group.allreduce([x], options))

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[...] to [size, ...]: every rank's ``x``; in ``out``, contiguous and of as many numbers,
        or in new memory."""
        if self._group is None:
            return x.unsqueeze(0) if out is None else out.copy_(x.view(out.shape))
        self.begin()
        found = x.new_empty((self.group.size, *x.shape)) if out is None else out
        options = AllgatherOptions()
        options.asyncOp = False
        parts = found.view(-1), x.contiguous().view(-1)
        _finish(self._group._allgather_base(*parts, options))
        return found

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        """Write to ``out`` [...] the sum of what all ranks have for this one in their ``x``,
        [size, ...]. Both are contiguous."""
        if self._group is None:
            out.copy_(x[0])
            return
        self.begin()
        options = ReduceScatterOptions()
        options.asyncOp = False
        _finish(self._group._reduce_scatter_base(out.view(-1), x.view(-1), options))

    def all_to_all(
        self,
        x: Tensor,
        out: Tensor,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
    ) -> None:
        """Give each rank its part of the rows of ``x``, and write to ``out`` what all ranks have
        for this one, in their order. Both are contiguous.

        Args:
            x: [S, ...]
            out: [R, ...]
            sent: [size], rows for each rank; None: as many for each.
            received: [size], rows from each rank; None likewise. What one rank sends, another one
                has to await.
        """
        if self._group is None:
            out.copy_(x)
            return
        self.begin()
        options = AllToAllOptions()
        options.asyncOp = False
        rows = list(received or ()), list(sent or ())
        _finish(self._group.alltoall_base(out, x, *rows, options))

    def reach(self) -> None:
        """Make memory that all ranks read directly, if each can. Every rank calls it."""
        assert self._device is not None
        assert self._store is not None
        store = PrefixStore(f"{self.group.name}-symmetric", self._store)
        reason = "another rank cannot"
        try:
            self.symmetric = SymmetricBuffer(self.group, store, self._device)
        except Exception as error:  # drivers and plug-ins fail with errors of many types
            reason = describe(error)
        missing = torch.tensor([self.symmetric is None], dtype=torch.int32, device=self._device)
        self.all_reduce(missing)
        if missing.item():
            self.drop_symmetric(reason)

    def drop_symmetric(self, reason: str) -> None:
        """Do without the memory that all ranks read, and say why. Every rank calls it."""
        self.unreached = reason
        logger.info("ranks: no memory that all of them read directly (%s)", reason)
        if self.symmetric is not None:
            self.symmetric.close()
            self.symmetric = None

    def abort(self) -> None:
        """End what waits for a rank that is gone, on any thread, where the backend can."""
        if self.symmetric is not None:
            self.symmetric.give_up()
        self._abort(self._group)

    def _abort(self, group: Any) -> None:
        abort = getattr(group, "abort", None)
        if abort is not None:
            abort()

    def close(self) -> None:
        """Leave the group."""
        _known.pop(self.group.name, None)
        group, self._group = self._group, None
        if self.symmetric is not None:
            self.symmetric.close()
            self.symmetric = None
        if group is not None and self._device is not None and self._device.index is not None:
            # It waits until the graphs that hold its collectives are gone, which may be kept.
            leave = threading.Thread(
                target=self._abort, args=(group,), name="reprise-leave", daemon=True
            )
            _leaving.append(leave)
            leave.start()


@atexit.register
def _left() -> None:
    """A thread that wants to go on in Python when that is over tears down the process."""
    until = time.monotonic() + LEAVE_SECONDS
    for each in _leaving:
        each.join(max(0.0, until - time.monotonic()))


def _finish(work: Any) -> None:
    """Wait, where the backend gives something to wait for and has not done so."""
    if work is not None:
        work.wait()


def communicator(name: str) -> Communicator:
    """The communicator of the group of this name.

    Raises:
        PlatformError: There is none (any more).
    """
    try:
        return _known[name]
    except KeyError:
        raise PlatformError(
            f"group {name!r} has no communicator: its engine was closed, or never made one"
        ) from None


def reached(group: str, **_: object) -> str | None:
    """Why kernels that write into other ranks' memory do not compute for a group; None: they do."""
    ranks = communicator(group)
    if ranks.symmetric is not None:
        return None
    return f"its ranks have no memory that all of them reach ({ranks.unreached})"


def connect(
    group: Group,
    backend: str,
    store: Store,
    device: torch.device,
    timeout: float,
    *,
    direct: bool = True,
) -> Communicator:
    """Make a group's communicator. Every rank calls it.

    Args:
        group: The ranks.
        backend: As ``torch.distributed`` calls it: ``gloo``, ``nccl``, ``xccl``, or a plug-in's.
        store: Through which the ranks find each other.
        device: That this rank computes on.
        timeout: Seconds after which a rank that waits gives up, where the backend knows that.
        direct: Whether ranks may read each other's memory, where they are on one host and their
            devices can.

    Raises:
        PlatformError: This torch does not have the backend.
    """
    made = _make(group, backend, PrefixStore(group.name, store), timeout)
    eager = getattr(made, "eager_connect_single_device", None)
    if eager is not None and device.index is not None:
        eager(device)  # a failure to connect shows now, and memory is taken before it is measured
    found = _known[group.name] = Communicator(group, made, device, store)
    if direct:
        if device.index is None:
            found.drop_symmetric(f"{device} has none")
        elif not group.on_one_host:
            found.drop_symmetric("the ranks are on several hosts")
        else:
            found.reach()
    return found


def _make(group: Group, backend: str, store: Store, timeout: float) -> Any:
    limit = timedelta(seconds=timeout)
    if backend == "gloo":
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=group.host.address)]
        options._timeout = limit
        return gloo(store, group.rank, group.size, options)
    if backend == "nccl" and dist.is_nccl_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        with _unwatched():
            return dist.ProcessGroupNCCL(store, group.rank, group.size, options)
    if backend == "xccl" and getattr(dist, "is_xccl_available", lambda: False)():
        options = dist.ProcessGroupXCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupXCCL(store, group.rank, group.size, options)
    plugin = dist.Backend._plugins.get(backend.upper())
    if plugin is not None and not plugin.extended_api:
        return plugin.creator_fn(store, group.rank, group.size, limit)
    raise PlatformError(
        f"this torch ({torch.__version__}) has no collectives of backend {backend!r}; install one "
        "that has, or leave tensor_parallel_size out"
    )


@contextmanager
def _unwatched() -> Iterator[None]:
    """A process group made here ends no process when a rank is lost: the leader watches ranks, and
    its process is the user's."""
    wanted = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({k: v for k, v in wanted.items() if before[k] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


class Echo(Communicator):
    """Of one rank whose others have what it has: what collectives do, without other processes."""

    def all_reduce(self, x: Tensor) -> None:
        x.mul_(self.group.size)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        found = x.unsqueeze(0).repeat(self.group.size, *(1 for _ in x.shape))
        return found if out is None else out.copy_(found.view(out.shape))

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        torch.mul(x.view(self.group.size, *out.shape)[self.group.rank], self.group.size, out=out)

    def all_to_all(
        self,
        x: Tensor,
        out: Tensor,
        sent: Sequence[int] | None = None,
        received: Sequence[int] | None = None,
    ) -> None:
        size, rank = self.group.size, self.group.rank
        ours = x.tensor_split(size) if sent is None else x.split(list(sent))
        out.copy_(torch.cat([ours[rank]] * size))


_known[ALONE.name] = Communicator(ALONE)
_known[ECHO.name] = Echo(ECHO)
