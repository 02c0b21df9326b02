"""Compilations of a start, handed over to processes beside (:mod:`reprise.kernels_beside`).

In a ``with`` block of :meth:`Start.calling` a kernel that Triton's cache lacks is compiled there,
while the thread that called it waits and holds nothing, and is then found in the cache. In one of
:meth:`Start.asking` kernels are only asked for: nothing is launched, so that an op that launches
several has them compiled at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any, NamedTuple

import triton
from triton import knobs

from reprise import kernels_beside
from reprise.errors import describe
from reprise.kernels_beside import Job, packed

logger = logging.getLogger(__name__)

FEW = 3
"""Kernels that this process compiles at a time before it begins another one, which takes as long to
start as one of them."""
SETTINGS = ("cache.dir", "compilation.store_binary_only")
"""Of Triton's, what a program may set for one process alone."""
OWN = (
    "compilation.always_compile", "compilation.override", "compilation.dump_ir",
    "compilation.listener", "compilation.use_ir_loc", "runtime.add_stages_inspection_hook",
)  # fmt: skip
"""Those that are set to see how this process compiles."""
asking: set[int] = set()
"""Threads that only ask."""
_start: ContextVar[Start | None] = ContextVar("start", default=None)


class OnlyAsked(BaseException):
    """The kernel has been asked for, and there is none to launch."""


class Start:
    """What one start needs.

    Args:
        share: Processes that start on this machine at once.
    """

    def __init__(self, share: int = 1) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._asked: dict[str, Future[float] | None] = {}
        """By the hash in Triton's cache; None: it cannot be handed over."""
        self._launchers: dict[str, Future[float]] = {}
        """By what they depend on."""
        self._few = threading.BoundedSemaphore(FEW)
        self._begins = self._abandoned = False

    @contextlib.contextmanager
    def calling(self, begins: bool = False) -> Iterator[None]:
        """Kernels that are launched are compiled beside, or here.

        Args:
            begins: If one is missing, more will be: the process beside is begun.
        """
        self._begins = begins
        _replace_compile()
        token = _start.set(self)
        try:
            yield
        finally:
            _start.reset(token)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Kernels are asked for, and none is launched."""
        thread = threading.get_ident()
        with self.calling():
            asking.add(thread)
            try:
                yield
            finally:
                asking.discard(thread)

    def abandon(self) -> None:
        """No thread waits any more."""
        self._abandoned = True
        with self._lock:
            for each in (*self._asked.values(), *self._launchers.values()):
                if each is not None:
                    each.cancel()

    def compile(self, compiler: Any, source: Any, target: Any, options: Any, rest: Any) -> Any:
        """As Triton does, but perhaps elsewhere.

        Raises:
            OnlyAsked: See :meth:`asking`.
            CancelledError: The start was given up.
        """
        only_asks = threading.get_ident() in asking
        with contextlib.suppress(_Missing):
            with _unmade(source):  # what is kept costs nothing more than it does without this
                kernel = compiler(source, target=target, options=options, **rest)
            if only_asks:
                raise OnlyAsked
            self._wait_for_launcher(source)
            return kernel
        if self._begins:
            kernels_beside.begin(self._share)
        try:
            place = _Place.of(source, target, options)
        except Exception as error:  # another Triton than those that are known
            logger.info("kernel %s is compiled in this process: %s", source.name, describe(error))
            place = None
        if only_asks:
            if place is not None:
                self._ask(place, source, target, options)
            raise OnlyAsked
        here = place is not None and self._keeps(place)
        try:
            if place is not None and not here:
                self._wait(place, source, target, options)
                self._wait_for_launcher(source)
            return compiler(source, target=target, options=options, **rest)
        finally:
            if here:
                self._few.release()

    def _keeps(self, place: _Place) -> bool:
        """Whether this process compiles it, as one of few while none beside is ready."""
        beside = kernels_beside.begun()
        if beside is not None and beside.ready.is_set():
            return False
        with self._lock:
            if place.key in self._asked:
                return False
        return self._few.acquire(blocking=False)

    def _wait(self, place: _Place, *what: Any) -> None:
        """Have it compiled beside; if that fails it is still missing."""
        future = self._ask(place, *what)
        if future is None:
            return
        try:
            took = future.result()
        except kernels_beside.Ended as error:
            logger.warning("kernel %s is compiled in this process: %s", place.name, error)
        else:
            logger.debug("kernel %s was compiled beside in %.2f s", place.name, took)

    def _wait_for_launcher(self, source: Any) -> None:
        """If it was asked for; else, and if that fails, this process builds it."""
        if self._launchers:
            launcher = self._launchers.get(_signature(source))
            if launcher is not None:
                with contextlib.suppress(kernels_beside.Ended):
                    launcher.result()

    def _ask(self, place: _Place, source: Any, target: Any, options: Any) -> Future[float] | None:
        with self._lock:
            if self._abandoned:
                raise CancelledError
            if place.key not in self._asked:
                beside = kernels_beside.begin(self._share)
                self._asked[place.key] = (
                    None if beside is None else self._hand_over(beside, source, target, options)
                )
            return self._asked[place.key]

    def _hand_over(
        self, beside: kernels_beside.Beside, source: Any, target: Any, options: Any
    ) -> Future[float] | None:
        settings = {each: _setting(each) for each in SETTINGS}
        job = Job(
            source.fn, source.signature, source.constants, source.attrs, target, dict(options),
            None, settings,
        )  # fmt: skip
        try:
            found = beside.ask(packed(job))
        except Exception as error:
            logger.info("kernel %s is compiled in this process: %s", source.name, describe(error))
            return None
        launcher = triton.runtime.driver.active.launcher_cls
        signature = _signature(source)
        made = hasattr(sys.modules.get(launcher.__module__), "make_launcher")
        if made and "tensordesc" not in signature and signature not in self._launchers:
            self._launchers[signature] = beside.ask(packed(job._replace(launcher=launcher)))
        return found


def _signature(source: Any) -> str:
    """What a kernel's launcher depends on."""
    return str((list(source.signature.values()), list(source.constants)))


class _Missing(BaseException):
    """Triton's cache lacks it."""


@contextlib.contextmanager
def _unmade(source: Any) -> Iterator[None]:
    """In the ``with`` block nothing is made of it: a caller that finds no kernel of it raises."""

    def make_ir(*args: Any, **kwargs: Any) -> None:
        raise _Missing

    source.make_ir = make_ir
    try:
        yield
    finally:
        del source.make_ir


@functools.cache
def _replace_compile() -> None:
    """From now on kernels that are compiled within a start are compiled by it."""
    compiler = triton.compiler.compile

    @functools.wraps(compiler)
    def compiled(src: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        start = _start.get()
        plain = isinstance(src, triton.compiler.ASTSource) and target is not None
        if start is None or not plain or any(map(_setting, OWN)):
            return compiler(src, target=target, options=options, **rest)
        return start.compile(compiler, src, target, options, rest)

    triton.compiler.compile = compiled


def _setting(place: str) -> Any:
    group, _, name = place.partition(".")
    return getattr(getattr(knobs, group), name, None)


class _Place(NamedTuple):
    """A place in Triton's cache."""

    name: str
    key: str

    @classmethod
    def of(cls, source: Any, target: Any, options: Any) -> _Place:
        """As Triton finds it."""
        backend = triton.compiler.make_backend(target)
        parsed = backend.parse_options(dict(options or {}, **source.parse_options()))
        variables = triton._C.libtriton.get_cache_invalidating_env_vars()
        key = triton.compiler.get_cache_key(source, backend, parsed, env_vars=variables)
        return cls(source.name[:150], hashlib.sha256(key.encode()).hexdigest())
