"""Have kernels compiled side by side, before the first step needs them one after the other."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reprise import early, kernels_beside
from reprise.errors import OpError
from reprise.ops.choice import NOT_INVARIANT
from reprise.ops.registry import Op, OpTable, intercept
from reprise.ops.rms_norm import rms_norm
from reprise.platforms import Platform

logger = logging.getLogger(__name__)


_Call = tuple[Op, Callable[[], Any]]
_UNWRITTEN = {
    torch.empty, torch.empty_like, torch.empty_strided,
    Tensor.new_empty, Tensor.new_empty_strided,
}  # fmt: skip
_MOST_THREADS = 16
"""More would wait for Python's lock, in which much of a compilation happens."""


@contextlib.contextmanager
def compiling_ahead(
    table: OpTable,
    passes: Iterable[Callable[[], Any]],
    later: Iterable[Iterable[Callable[[], Any]]] = (),
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Ahead]:
    """Call once, in parallel threads, every op that the passes call and that compiles kernels.

    The passes are run without computing: op calls return memory of any content. They must not
    look into it. Calls whose arguments agree in shapes, strides and dtypes count as one. Ops that
    wait for other ranks are left out: threads would call them in another order on each rank.

    Kernels find memory by integers, such as the numbers of experts. Those that a pass makes and
    that were not computed are zeros, and stay so: an op that writes them has others.

    Args:
        table: The implementations.
        passes: Over the shapes to prepare.
        later: Groups of more of them, whose kernels may be missing when the ``with`` block begins,
            where processes beside compile them: see :meth:`Ahead.ready`. At its end they are ready.
        rank: Which of ``ranks`` that do the same on one host: each begins elsewhere, and finds in
            the cache of kernels what others have compiled.
        ranks: Their number.

    Yields:
        What there is to wait for. A call that fails is logged, and fails again where it is needed.
    """
    if not table.platform.has_triton:
        table.chosen  # noqa: B018 - nothing is compiled, and no step waits for an import
        yield Ahead(table, None, _Here())
        return
    start = _handed_over(ranks)
    with kernels_beside.used():
        pool = ThreadPoolExecutor(min(_MOST_THREADS, 1 + (os.cpu_count() or 1)))
        ahead = Ahead(table, pool, start)
        try:
            ahead.begin(passes, later, rank, ranks)
            with start.calling():  # a kernel that is wanted sooner is waited for
                yield ahead
            while ahead.ready():
                pass
            if ahead.well:
                kernels_beside.all_kept()
        except BaseException:
            start.abandon()
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown(wait=False)  # threads take a while to end


class Ahead:
    """Op calls that are made ahead."""

    def __init__(self, table: OpTable, pool: Any, start: Any) -> None:
        self._table, self._pool, self._start = table, pool, start
        self._later: list[list[_Call]] = []
        self.count = 0
        """All of them."""
        self.well = True
        """None has failed so far."""

    def begin(
        self,
        passes: Iterable[Callable[[], Any]],
        later: Iterable[Iterable[Callable[[], Any]]],
        rank: int,
        ranks: int,
    ) -> None:
        """Note all calls, and make those that may not wait; see :func:`compiling_ahead`."""
        noted = _Noted(self._table)
        calls: list[_Call] = []
        asked: list[Future[None]] = []
        beside = kernels_beside.begun() is not None
        with self._computing():
            for each in passes:
                found = noted.in_passes([each])
                calls += found
                if beside and ranks == 1:  # attention takes longest: before the next pass
                    asked += self._ask([call for call in found if call[0].break_op])
            groups = [noted.in_passes(each) for each in later]
            waiting = [call for group in groups for call in group]
            self.count = len(calls) + len(waiting)
            calls.sort(key=lambda call: not call[0].break_op)
            attends = sum(call[0].break_op for call in calls)
            if beside:
                first = calls[:attends] if ranks > 1 else []
                asked += self._ask(_turned([*first, *waiting, *calls[attends:]], rank, ranks))
                futures.wait(asked)
                # Threads that wait for attention would keep what is compiled sooner waiting.
                self._later = [calls[attends:] + calls[:attends], *groups]
            else:  # this process would compile them meanwhile
                calls[attends:attends] = waiting
                self._later = [_turned(calls, rank, ranks)]
        self.ready()
        if self.count:
            later_on = sum(map(len, self._later))
            more = f", those of {later_on} more are compiled beside" if later_on else ""
            logger.info("kernels of %d op calls are ready%s", self.count - later_on, more)

    def ready(self) -> bool:
        """Make the calls of the next group, whose kernels are waited for; whether there was one.

        No graph may be captured meanwhile, beside which no other thread may touch the device.
        """
        if not self._later:
            return False
        made = ((op, partial(_call, self._start, call)) for op, call in self._later.pop(0))
        with self._computing():
            self.well &= _finish(_start(self._pool, self._table, made))
        return True

    def _ask(self, calls: list[_Call]) -> list[Future[None]]:
        """Ask for all kernels that the calls launch at once."""
        some = partial(_ask, self._start, calls)
        return [_submit(self._pool, self._table, some)] if calls else []

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        with self._table.computing(), _binaries_alone(self._table.platform):
            yield


class _Noted:
    """Op calls that passes make, each once."""

    def __init__(self, table: OpTable) -> None:
        self._table = table
        self._calls: list[_Call] = []
        self._known: set[Any] = set()
        self._zeros = _Zeros()

    def in_passes(self, passes: Iterable[Callable[[], Any]]) -> list[_Call]:
        """The calls of these passes that no earlier pass has made."""
        before = len(self._calls)
        with self._table.computing(), intercept(self._note), self._zeros:
            for each in passes:
                each()
        return self._calls[before:]

    def _note(
        self, op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        key = (op.name, *map(_signature, args), *map(_signature, kwargs.values()))
        if op.collective or key in self._known:
            return op.fake(*args, **kwargs)
        if self._table.implementation_of(op, args, kwargs).compiles:
            self._known.add(key)
            other = self._zeros.other
            written = op.written(op.named(args, kwargs)).values()
            others = {id(each): other(each) for each in written}
            own = [others.get(id(each), each) for each in args]
            named = {name: others.get(id(each), each) for name, each in kwargs.items()}
            self._calls.append((op, partial(function, *own, **named)))
        return op.fake(*args, **kwargs)


def _turned(calls: list[_Call], rank: int, ranks: int) -> list[_Call]:
    """What a rank begins with others have at the end."""
    begin = len(calls) * rank // ranks
    return calls[begin:] + calls[:begin]


def _handed_over(ranks: int) -> Any:
    """What has kernels compiled in processes of their own; in this one, where there is no Triton
    that can be asked to."""
    try:
        return importlib.import_module("reprise.ops.handed_over").Start(ranks)
    except Exception:  # it may be missing, or not import
        return _Here()


class _Here:
    """Nothing is handed over."""

    def calling(self, begins: bool = False) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    asking = calling

    def abandon(self) -> None:
        """No thread waits."""


def _ask(start: Any, calls: Iterable[_Call]) -> None:
    """In order: threads would ask for the last ones as soon as for the first."""
    # Of what is asked for nothing is computed, and kernels find memory by integers.
    with start.asking(), _Zeros():
        for _, call in calls:
            with contextlib.suppress(Exception):  # it fails again where it is made
                call()


def _call(start: Any, call: Callable[[], Any]) -> None:
    with start.calling():
        call()


class _Zeros(TorchFunctionMode):
    """Makes zeros of integers that would have any content."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _UNWRITTEN and not result.is_floating_point():
            self._made[result.untyped_storage().data_ptr()] = result.zero_()
        return result

    def other(self, tensor: Tensor) -> Tensor:
        """Where it is such zeros, others that lie as they do; else itself."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._made:
            return tensor
        layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            storage.clone(), *layout
        )


def called(
    table: OpTable, passes: Iterable[Callable[[], Any]]
) -> tuple[dict[str, list[str]], list[str]]:
    """What computes these passes, which are run without computing.

    Returns:
        The names of implementations, and of the ops that they compute; and the ops of which the
        table has no batch-invariant implementation for some call, each once, with the reason where
        there is one.
    """
    reasons: dict[str, None] = {}
    chosen: dict[str, list[str]] = {}

    def note(
        op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            computes = chosen.setdefault(table.implementation_of(op, args, kwargs).name, [])
            if op.name not in computes:
                computes.append(op.name)
        except OpError as error:
            text = str(error).removeprefix(NOT_INVARIANT)
            reasons[text.removesuffix(f" on {table.platform.name}")] = None
        return op.fake(*args, **kwargs)

    with table.computing(), intercept(note):
        for each in passes:
            each()
    return chosen, list(reasons)


@contextlib.contextmanager
def _binaries_alone(platform: Platform) -> Iterator[None]:
    """What Triton compiles in the ``with`` block it keeps without its way there: five texts a
    kernel, which would be written now, and read whenever it is loaded. A user may want them."""
    knobs: Any = None
    if platform.keeps_binaries_alone and "TRITON_STORE_BINARY_ONLY" not in os.environ:
        with contextlib.suppress(Exception):  # it may be missing, or not import
            knobs = importlib.import_module("triton.knobs").compilation
    if not hasattr(knobs, "store_binary_only") or not hasattr(knobs, "scope"):
        yield
        return
    with knobs.scope():
        knobs.store_binary_only = True
        yield


def load_compiler(platform: Platform) -> None:
    """Do what the first kernel of a process pays and no device takes part in: import the compiler,
    and fingerprint it for the kernel cache, which reads it all."""
    with ThreadPoolExecutor(1) as pool:
        if platform.has_triton:
            pool.submit(early.fingerprint_compiler)
        OpTable(platform).candidates["rms_norm"]


def wake_compiler(platform: Platform, ranks: int = 1) -> None:
    """Compile one small kernel, and with it pay what else the first kernel of a process pays; not
    where nothing is known to be compiled yet, so that it would keep those that are needed waiting.

    Args:
        platform: The device.
        ranks: Processes that do the same on this host.
    """
    if kernels_beside.begun() is not None:
        return
    table = OpTable(platform)
    if not table.candidates["rms_norm"][0].compiles:
        return
    row = torch.ones(1, 16, dtype=platform.default_dtype, device=platform.device)
    start = _handed_over(ranks)
    with table.computing(), start.calling(begins=True):
        try:
            rms_norm(row, row[0], 1e-6)
        except Exception as error:
            # Those that are needed may compile, and fail by name where they do not.
            logger.warning("the first kernel does not compile: %s", error)


def _start(
    pool: ThreadPoolExecutor, table: OpTable, calls: Iterable[_Call]
) -> list[tuple[str, Future[None]]]:
    return [(op.name, _submit(pool, table, call)) for op, call in calls]


def _submit(pool: ThreadPoolExecutor, table: OpTable, call: Callable[[], Any]) -> Future[None]:
    def run() -> None:
        table.platform.activate()
        # Libraries want a thread to have used the device before it calls them.
        table.platform.synchronize()
        with torch.inference_mode():
            call()

    return pool.submit(contextvars.copy_context().run, run)


def _finish(running: list[tuple[str, Future[None]]]) -> bool:
    """Whether all went well."""
    errors = [(name, each.exception()) for name, each in running]
    for name, error in errors:
        if error is not None:
            logger.warning("kernels of op %s were not compiled ahead: %s", name, error)
    return not any(error for _, error in errors)


def _signature(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value
