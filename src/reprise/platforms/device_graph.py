"""A device graph: work captured once, replayed on the same addresses without running Python."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from torch import Tensor

from reprise.errors import GraphError

T = TypeVar("T")


class Recorder(Protocol):
    """Sees the ops of a thread, on a platform whose graphs are recorded."""

    def launch(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See :func:`launch`."""

    def host_code(self) -> contextlib.AbstractContextManager[None]:
        """See :func:`host_code`."""


class _ThreadState(threading.local):
    graph: DeviceGraph | None = None
    recorder: Recorder | None = None
    """Set while the thread is inside the capture stream of a platform with recorded graphs."""
    passes: int = 0


state = _ThreadState()


def capturing() -> bool:
    """Whether work that this thread submits now goes into a graph instead of running."""
    return state.graph is not None


def in_capture_pass() -> bool:
    """Whether a forward pass is being captured, the breaks between its segments included."""
    return state.passes > 0 or state.graph is not None


@contextlib.contextmanager
def capture_pass() -> Iterator[None]:
    """The ``with`` block is one forward pass that is captured, perhaps in segments."""
    state.passes += 1
    try:
        yield
    finally:
        state.passes -= 1


def launch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` as one piece of device work.

    An accelerator captures the kernels that it launches. A recorded graph takes the call whole:
    replay calls ``function`` again with the same arguments, and it may read their values then.
    """
    if state.recorder is None:
        return function(*args, **kwargs)
    return state.recorder.launch(function, args, kwargs)


@contextlib.contextmanager
def host_code() -> Iterator[None]:
    """Inside :func:`launch`: what runs in the ``with`` block is host code again.

    An op implemented in Python runs its host part once, at capture; only what it launches is
    replayed. Recorded graphs take an op whole, so such an op must say which part is host code.
    """
    recorder = state.recorder
    with contextlib.nullcontext() if recorder is None else recorder.host_code():
        yield


class DeviceGraph(ABC):
    """Capture with :meth:`capture`, or with :meth:`begin` and :meth:`end`; then :meth:`replay`.

    Capture runs on the platform's capture stream (``Platform.capture_stream``). All tensors used
    must stay at their addresses; host scalars keep the value they had; reading a device value on
    the host is an error.
    """

    computes_while_captured = False
    """Capture also does the work, as far as it has come."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.empty = False
        """Capture found no work, so that replay would do nothing."""
        self._captured = False

    def capture(self, function: Callable[[], T]) -> T:
        """Capture what ``function`` does, on the capture stream, and return its result.

        Raises:
            GraphError: The work cannot be captured; the graph stays empty.
        """
        with self._stream():
            self.begin()
            try:
                result = function()
            except BaseException:
                self.abort()
                raise
            self.end()
        return result

    def begin(self) -> None:
        """Start to capture. The capture stream must be current."""
        if state.graph is not None:
            raise GraphError("a graph capture is already in progress in this thread")
        if self._captured:
            raise GraphError("the graph was captured before; make a new one")
        self._begin()
        state.graph = self

    def end(self) -> None:
        """Finish the capture; the graph can be replayed from now on.

        Raises:
            GraphError: The device refuses the graph.
        """
        if state.graph is not self:
            raise GraphError("end() without begin()")
        state.graph = None
        self._end()
        self._captured = True

    def abort(self) -> None:
        """Leave a capture that failed; harmless when none is in progress."""
        if state.graph is self:
            state.graph = None
            # What failed inside a capture usually makes its end fail too.
            with contextlib.suppress(GraphError, RuntimeError):
                self._end()

    def replay(self) -> None:
        """Do the captured work again, on the current stream.

        Raises:
            GraphError: Nothing was captured.
        """
        if not self._captured:
            raise GraphError("replay() of a graph that was never captured")
        self._replay()

    @abstractmethod
    def may_own(self, tensor: Tensor) -> bool:
        """False if the tensor's memory is certainly not in this graph's pool."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes by which this graph's capture made the pool grow."""

    @abstractmethod
    def _stream(self) -> contextlib.AbstractContextManager[Any]: ...

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    @abstractmethod
    def _replay(self) -> None: ...
