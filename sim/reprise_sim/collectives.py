"""Collectives between processes: staged through memory of the host, where gloo runs them.

A device's tensors are read behind the work of the current stream, and what has come is written in
its order, so collectives are ordered as ops are; the host waits for the others' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

BACKEND = "simgloo"


class SimGloo(dist.ProcessGroup):
    """A process group of gloo for tensors of the device ``sim``."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return self._staged(tensors, lambda host: self._gloo.allreduce(host, opts or _all_reduce()))

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return self._staged(tensors, lambda host: self._gloo.broadcast(host, opts))

    def reduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        return self._staged(tensors, lambda host: self._gloo.reduce(host, opts))

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None
    ) -> Any:
        gathered = [[_empty(each) for each in group] for group in outputs]
        self._gloo.allgather(gathered, [each.cpu() for each in inputs]).wait()
        for group, theirs in zip(outputs, gathered, strict=True):
            for target, source in zip(group, theirs, strict=True):
                target.copy_(source)
        return _Done([each for group in outputs for each in group])

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        gathered = _empty(output)
        self._gloo._allgather_base(gathered, given.cpu()).wait()
        output.copy_(gathered)
        return _Done([output])

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> Any:
        whole = given.cpu()
        self._gloo.allreduce([whole], _all_reduce(None if opts is None else opts.reduceOp)).wait()
        output.copy_(whole.view(self.size(), *output.shape)[self.rank()])
        return _Done([output])

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int) -> Any:
        self._gloo.send([each.cpu() for each in tensors], rank, tag).wait()
        return _Done(list(tensors))

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int) -> Any:
        return self._staged(tensors, lambda host: self._gloo.recv(host, rank, tag))

    def barrier(self, opts: Any = None) -> Any:
        self._gloo.barrier().wait()
        return _Done([])

    def _staged(self, tensors: Sequence[Tensor], run: Callable[[list[Tensor]], Any]) -> Any:
        host = [each.cpu() for each in tensors]
        run(host).wait()
        for target, source in zip(tensors, host, strict=True):
            target.copy_(source)
        return _Done(list(tensors))


class _Done(dist._Work):
    """A collective whose results have been written."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def result(self) -> list[Tensor]:
        return self._tensors


def _empty(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, device="cpu")


def _all_reduce(reduction: Any = None) -> Any:
    options = dist.AllreduceOptions()
    if reduction is not None:
        options.reduceOp = reduction
    return options


def register() -> None:
    """Tell torch of the backend."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, SimGloo, devices=["sim"])
