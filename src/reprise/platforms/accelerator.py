"""Everything that CUDA, ROCm and XPU share, written against torch's device-neutral API."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Collection, Iterator
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor

from reprise.errors import GraphError, PlatformError
from reprise.platforms.base import MemoryInfo, Platform
from reprise.platforms.borrow import borrow_bytes
from reprise.platforms.device_graph import DeviceGraph

GIB = 1 << 30
MOST_STREAMS = 64
"""More than torch has of one device and priority."""


class _Captures:
    """Where a device's graphs are captured: all engines' of the process, one after the other.

    torch has a few streams of a device and gives them out in turn. If each engine took one for its
    captures, that of another could be the same, or one on which another loads weights meanwhile,
    whose work would be a part of the graph.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.lock = threading.RLock()


_captures: dict[tuple[type[Platform], int], _Captures] = {}
"""By platform and index of the device."""
_making = threading.Lock()


class AcceleratorPlatform(Platform):
    """A device that PyTorch exposes as ``torch.accelerator``.

    A subclass sets data; methods are overridden only where the hardware differs. All calls go
    through ``torch.accelerator`` or the device module (``torch.get_device_module``), so what is
    tested on one accelerator is the code that runs on the others. What CUDA's module has beyond
    ``torch.accelerator`` is used where a module has it; graphs need its ``graph_pool_handle``.
    """

    priority: ClassVar[int] = 100
    pins_memory: ClassVar[bool] = True
    graphs_by_default: ClassVar[bool] = True
    asynchronous: ClassVar[bool] = True
    counts_memory: ClassVar[bool] = True
    preferred: ClassVar = {"*": ("triton", "torch", "reference")}
    triton_backend: ClassVar[str | None] = None
    """The backend of Triton that compiles for the device (its entry point), or None."""
    reserve_bytes: ClassVar[int] = GIB // 4
    """Left free beside the KV cache, for allocator fragmentation and library workspaces."""

    @classmethod
    def module(cls) -> Any:
        """The torch module of this device type, such as ``torch.xpu``."""
        return torch.get_device_module(cls.device_type)

    @classmethod
    def built_for_this(cls) -> bool:
        """Whether this build of torch drives this platform's hardware."""
        return True

    @classmethod
    def unavailable_reason(cls) -> str | None:
        if not cls.built_for_this():
            return f"torch {torch.__version__} is not built for {cls.name}"
        if not torch.accelerator.is_available():
            return "torch finds no accelerator (driver missing, or no device visible)"
        found = torch.accelerator.current_accelerator()
        if found is None or found.type != cls.device_type:
            return f"the accelerator that torch finds is {found}, not {cls.device_type}"
        return None

    @classmethod
    def device_count(cls) -> int:
        return torch.accelerator.device_count()

    @property
    def device_name(self) -> str:
        name = getattr(self.module(), "get_device_name", None)
        return str(self.device) if name is None else str(name(self.index))

    @functools.cached_property
    def has_triton(self) -> bool:
        return self.triton_backend in entry_points(group="triton.backends").names

    @property
    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.supports_dtype(torch.bfloat16) else torch.float16

    def supports_dtype(self, dtype: torch.dtype) -> bool:
        supported = getattr(self.module(), "is_bf16_supported", None)
        if dtype is torch.bfloat16 and supported is not None:
            return bool(supported())
        return super().supports_dtype(dtype)

    # ---- order of work -------------------------------------------------------------------

    def activate(self) -> None:
        torch.accelerator.set_device_index(self.index)

    def warm_up(self) -> None:
        """Create the device's context, load its matrix library and those of torch's kernels that
        every start calls: the driver takes up to 60 ms for the first of a kind."""
        self.activate()
        square = torch.ones(16, 16, device=self.device, dtype=self.default_dtype)
        torch.mm(square, square)
        numbers = torch.zeros(1, device=self.device, dtype=torch.int64) // 16
        torch.nn.functional.embedding(numbers, square).float().softmax(dim=-1)
        self.synchronize()

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self.index)

    def current_stream(self) -> Any:
        return torch.accelerator.current_stream(self.index)

    def use_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        own = getattr(self.module(), "stream", None)
        return self._on_stream(stream) if own is None else own(stream)

    @contextlib.contextmanager
    def _on_stream(self, stream: Any) -> Iterator[Any]:
        # A torch.Stream is a context, but cannot be entered again inside of itself.
        outer = self.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            yield stream
        finally:
            torch.accelerator.set_stream(outer)

    def stream(self) -> Any:
        if not self.has_graphs:
            return self._next_stream()
        # torch has a few streams and gives them out in turn, the one of captures too.
        for _ in range(MOST_STREAMS):
            found = self._next_stream()
            if found != self._capture_stream:
                return found
        raise PlatformError(
            f"platform {self.name!r} gives out no stream but the one of captures: have its module "
            "make several, or set graph_class=None"
        )

    def _next_stream(self) -> Any:
        own = getattr(self.module(), "Stream", None)
        return super().stream() if own is None else own(device=self.index)

    # ---- graphs --------------------------------------------------------------------------

    @property
    def has_graphs(self) -> bool:
        if self.graph_class is None:
            return False
        return hasattr(self.module(), self.graph_class) or hasattr(torch.accelerator, "Graph")

    def graph_pool(self) -> Any:
        return self.module().graph_pool_handle()

    def graph_pool_memory(self, pool: Any) -> list[torch.Tensor]:
        snapshot = getattr(self.module(), "memory_snapshot", None)
        if snapshot is None:
            return []
        return [
            borrow_bytes(segment["address"], segment["total_size"], self.device)
            for segment in snapshot()
            if tuple(segment.get("segment_pool_id", ())) == tuple(pool)
            and segment["device"] == self.index
        ]

    def reaches(self, other: int) -> bool | None:
        asked = getattr(self.module(), "can_device_access_peer", None)
        if asked is None:
            return None
        return other == 0 or bool(asked(self.index, self.index + other))

    @functools.cached_property
    def _captures(self) -> _Captures:
        device = type(self), self.index
        with _making:
            if device not in _captures:
                _captures[device] = _Captures(self._next_stream())
            return _captures[device]

    @property
    def _capture_stream(self) -> Any:
        return self._captures.stream

    @contextlib.contextmanager
    def capture_stream(self) -> Iterator[Any]:
        # One stream for all captures: the allocator reuses a pool's memory within a stream only.
        with self._captures.lock:
            outer = self.current_stream()
            self._capture_stream.wait_stream(outer)
            try:
                with self.use_stream(self._capture_stream):
                    yield self._capture_stream
            finally:
                # After a failure too: what was queued before it still reads its inputs.
                outer.wait_stream(self._capture_stream)

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        if not self.has_graphs:
            return super().new_graph(pool)
        return AcceleratorGraph(self, self.graph_pool() if pool is None else pool)

    # ---- memory --------------------------------------------------------------------------

    def memory_info(self) -> MemoryInfo:
        own = getattr(self.module(), "mem_get_info", None)
        free, total = (torch.accelerator.get_memory_info if own is None else own)(self.index)
        return MemoryInfo(free=free, total=total)

    def memory_allocated(self) -> int:
        return torch.accelerator.memory_allocated(self.index)

    def peak_memory_allocated(self) -> int:
        return torch.accelerator.max_memory_allocated(self.index)

    def memory_reserved(self) -> int:
        # Each segment of a graph asks twice, and one number costs what all hundred in a row do.
        nested = getattr(self.module(), "memory_stats_as_nested_dict", None)
        if nested is None:
            return torch.accelerator.memory_reserved(self.index)
        found = nested(self.index)
        return int(found["reserved_bytes"]["all"]["current"]) if found else 0

    def reset_peak_memory(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self.index)

    def empty_cache(self) -> None:
        torch.accelerator.empty_cache()

    def cache_budget(self, utilization: float, activation_bytes: int) -> int:
        memory = self.memory_info()
        cached = self.memory_reserved() - self.memory_allocated()
        used = memory.total - memory.free - cached
        allowed = int(memory.total * utilization) - used
        return min(allowed, memory.free + cached) - activation_bytes - self.reserve_bytes


@functools.cache
def _parameters(function: Any) -> Collection[str] | None:
    """Names of the parameters; None where it does not say, as what is written in C++."""
    try:
        return frozenset(inspect.signature(function).parameters)
    except ValueError:
        return None


class AcceleratorGraph(DeviceGraph):
    """A graph of any device that PyTorch drives.

    Made with ``torch.accelerator.Graph`` where this torch has it, else with the class that the
    platform names (``graph_class``) in the device module.
    """

    def __init__(self, platform: AcceleratorPlatform, pool: Any) -> None:
        super().__init__(pool)
        self._platform = platform
        self._begin_arguments: dict[str, Any] = {}
        neutral = getattr(torch.accelerator, "Graph", None)
        if neutral is not None:
            self._graph = neutral(pool=pool, capture_error_mode="thread_local")
        else:
            assert platform.graph_class is not None
            self._graph = getattr(platform.module(), platform.graph_class)()
            wanted = {"pool": pool, "capture_error_mode": "thread_local"}
            known = _parameters(type(self._graph).capture_begin)  # None: torch's own take both
            self._begin_arguments = {k: v for k, v in wanted.items() if known is None or k in known}
        self._nbytes = 0
        self._reserved: int | None = None
        """Before the capture."""

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def may_own(self, tensor: Tensor) -> bool:
        # All that is allocated on the device during capture goes to the pool.
        return tensor.device == self._platform.device

    def _stream(self) -> contextlib.AbstractContextManager[Any]:
        return self._platform.capture_stream()

    def _begin(self) -> None:
        self._reserved = self._memory_reserved()
        self._graph.capture_begin(**self._begin_arguments)

    def _end(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self._graph.capture_end()
            except RuntimeError as error:
                raise GraphError(f"the device refused the captured graph: {error}") from error
        for warning in caught:
            if "is empty" in str(warning.message):
                self.empty = True
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        before, after = self._reserved, self._memory_reserved()
        self._nbytes = 0 if before is None or after is None else max(0, after - before)

    def _memory_reserved(self) -> int | None:
        try:
            return self._platform.memory_reserved()
        except Exception:  # a count for people: no graph is refused for want of it
            return None

    def _replay(self) -> None:
        self._graph.replay()
