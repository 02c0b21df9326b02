"""The contract a device fulfils. The rest of Reprise asks a platform, never which one it is."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from reprise.errors import GraphError, PlatformError
from reprise.platforms.host_queue import HostEvent, HostStream

if TYPE_CHECKING:
    from reprise.config import EngineConfig
    from reprise.platforms.device_graph import DeviceGraph


PromptAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Causal attention of a prompt's tokens to each other: query [T, Hq, D], keys and values [T, Hkv,
D], out [T, Hq, D], which is written, and a factor of the scores."""


@dataclass(frozen=True)
class MemoryInfo:
    """Memory of one device, in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class Adjustment:
    """One change that a platform made to a configuration, and why."""

    field: str
    old: Any
    new: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new} ({self.reason})"


class Platform(ABC):
    """What one kind of device is (data) and does (a few methods).

    A platform is instantiated once an engine with the index of the device it drives.
    Subclass :class:`reprise.platforms.accelerator.AcceleratorPlatform` for hardware that
    PyTorch exposes through ``torch.accelerator``; it leaves little but data to write.
    """

    name: ClassVar[str]
    """What the user types after ``--device``."""
    device_type: ClassVar[str]
    """The type part of the device's ``torch.device``."""
    priority: ClassVar[int] = 50
    """``--device auto`` takes the available platform of highest priority."""
    dist_backend: ClassVar[str] = "gloo"
    cluster_resource: ClassVar[str] = "GPU"
    """What Ray calls such a device among the resources of a node."""
    visible_devices_variable: ClassVar[str | None] = None
    """Environment variable that selects devices of this kind."""
    graph_class: ClassVar[str | None] = None
    """Name of the graph class in the device module, or None: no device graphs."""
    graphs_by_default: ClassVar[bool] = False
    """Whether ``graph_mode=auto`` captures graphs."""
    graph_memory: ClassVar[Literal["measure", "skip"]] = "skip"
    """Whether the driver's free memory tells what graphs take. ``skip``: reserve what the
    allocator counts, where it does (``counts_memory``)."""
    graph_memory_reason: ClassVar[str] = "the platform captures no graphs"
    is_the_host: ClassVar[bool] = False
    """The device is the host's processors: any number of engines share it."""
    pins_memory: ClassVar[bool] = False
    """Host memory may be page-locked, so that copies to the device are asynchronous."""
    fp8_dtype: torch.dtype | None = None
    """The eight-bit floating-point numbers that kernels convert here, of four exponent bits; None:
    there are none."""
    takes_ptx: ClassVar[bool] = False
    """Triton kernels may have inline assembly in NVIDIA's PTX."""
    keeps_binaries_alone: ClassVar[bool] = False
    """Triton can keep what it compiled for the device without what it made on the way there."""
    compiles_by_storage: ClassVar[bool] = True
    """Triton compiles kernels anew for tensors in memory that 32 bits do not address."""
    counts_memory: ClassVar[bool] = False
    """:meth:`memory_allocated` and :meth:`peak_memory_allocated` measure something."""
    asynchronous: ClassVar[bool] = False
    """Submitted work runs while the host goes on; the engine then prepares one step ahead."""
    default_block_size: ClassVar[int] = 16
    """Tokens in a block of the KV cache."""
    default_batched_tokens: ClassVar[int] = 8192
    """New tokens in one step: enough to fill the device, few enough to keep decodes waiting
    for little."""
    prompt_attention: PromptAttention | None = None
    """What was seen to compute long prompts faster than Triton's kernels do; None: nothing was."""
    preferred: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Op name (or ``"*"`` for all others) to implementation names, most wanted first."""

    def __init__(self, index: int = 0) -> None:
        self.index = index

    @classmethod
    @abstractmethod
    def unavailable_reason(cls) -> str | None:
        """None if the device can be used on this machine, else one sentence that says why not."""

    @classmethod
    def device_count(cls) -> int:
        """Number of devices of this kind that are visible to the process."""
        return 1

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type, self.index)

    @property
    def device_name(self) -> str:
        """Marketing name of the device, for people and benchmark records."""
        return self.device_type

    @property
    def has_triton(self) -> bool:
        """Whether Triton kernels can run on this device."""
        return False

    @property
    def supports_pdl(self) -> bool:
        """Programmatic dependent launch: a kernel may start before its predecessor has ended."""
        return False

    @property
    def multiplies_fp8(self) -> bool:
        """Kernels can convert and multiply numbers of eight bits (float8_e4m3fn) directly."""
        return False

    def product_settings(self) -> tuple[Hashable, ...] | None:
        """What a program may set for products and their library heeds: beside it only shapes,
        dtypes, and how operands lie, decide which kernel computes one. None: unknown."""
        return None

    @property
    def default_dtype(self) -> torch.dtype:
        """Compute dtype for ``dtype=auto`` when the checkpoint's own dtype is not usable."""
        return torch.bfloat16

    def supports_dtype(self, dtype: torch.dtype) -> bool:
        """Whether ``dtype`` is a sensible compute dtype on this device."""
        return dtype in (torch.float32, torch.bfloat16, torch.float16)

    def prefers_dtype(self, dtype: torch.dtype) -> bool:
        """Whether a checkpoint stored in ``dtype`` is best computed in it on this device."""
        return self.supports_dtype(dtype)

    # ---- several ranks -------------------------------------------------------------------

    def device_of(self, rank: int, size: int) -> str:
        """What ``--device`` of a rank would be, where this device is rank 0's: the next ones.

        Raises:
            PlatformError: There are not so many.
        """
        count = self.device_count()
        if self.index + size > count:
            first = f" from {self.name}:{self.index} on" if self.index else ""
            variable = self.visible_devices_variable
            hint = f" ({variable} may hide some)" if variable else ""
            raise PlatformError(
                f"tensor_parallel_size={size} needs as many devices{first}, and {count} are "
                f"visible{hint}; lower it"
            )
        return f"{self.name}:{self.index + rank}"

    def reaches(self, other: int) -> bool | None:
        """Whether this device reads the memory of the one that stands ``other`` places behind it;
        None: unknown."""
        return None

    def share_host(self, size: int) -> None:  # noqa: B027 - an accelerator's host has little to do
        """So many ranks compute on this machine; called once in the leader's process. Followers
        are started with their number of threads."""

    # ---- order of work -------------------------------------------------------------------

    @abstractmethod
    def activate(self) -> None:
        """Make this device the current one of the calling thread."""

    @contextlib.contextmanager
    def warming_up(self, beside: Callable[[], Any], then: Callable[[], Any]) -> Iterator[None]:
        """Run :meth:`warm_up` and ``beside`` beside the ``with`` block, and ``then``, on this
        device, behind both; all is done when it ends."""
        warm = threading.Thread(target=self.warm_up, name="reprise-warm-up")

        def work() -> None:
            try:
                beside()
            finally:
                warm.join()
            self.activate()
            then()

        thread = threading.Thread(target=work, name="reprise-load-kernels")
        warm.start()
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def warm_up(self) -> None:  # noqa: B027 - nothing to do is a good answer
        """Do what the device does once, at its first use, such as loading its libraries."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until the device has finished all work submitted so far."""

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy memory of the host to ``target`` on the device, behind the work submitted so far and
        without waiting for it. All copies to the device that steps need come this way."""
        target.copy_(source, non_blocking=True)

    def stream(self) -> Any:
        """A stream of work, with ``wait_stream``, ``wait_event`` and ``synchronize``.

        It may have been given out before, but is never the one on which graphs are captured.
        """
        if not self.asynchronous:
            return HostStream()
        return torch.Stream(device=self.device)

    def event(self, *, timing: bool = False) -> Any:
        """A new event, with ``record``, ``wait``, ``synchronize`` and ``elapsed_time``."""
        if not self.asynchronous:
            return HostEvent()
        return torch.Event(device=self.device, enable_timing=timing)

    @abstractmethod
    def current_stream(self) -> Any:
        """The stream that work of the calling thread is submitted to."""

    @abstractmethod
    def use_stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Submit the work of the ``with`` block to ``stream``."""

    # ---- memory --------------------------------------------------------------------------

    @abstractmethod
    def memory_info(self) -> MemoryInfo:
        """Free and total memory of the device, as the driver reports them."""

    def memory_allocated(self) -> int:
        """Bytes held by live tensors of this process on the device; 0 where unknown."""
        return 0

    def peak_memory_allocated(self) -> int:
        """Largest :meth:`memory_allocated` since :meth:`reset_peak_memory`; 0 where unknown."""
        return 0

    def memory_reserved(self) -> int:
        """Bytes that the caching allocator holds, live tensors included; 0 where unknown."""
        return 0

    def reset_peak_memory(self) -> None:  # noqa: B027 - a platform without counters has no peak
        """Start a new peak measurement."""

    def empty_cache(self) -> None:  # noqa: B027 - a platform without a cache has none to empty
        """Return cached, unused memory to the driver."""

    def zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Many zeros on the device, in one dimension. Raises MemoryError or RuntimeError if it has
        not so much memory."""
        return torch.zeros(count, dtype=dtype, device=self.device)

    def weights_memory(
        self, weights: Sequence[torch.Tensor]
    ) -> contextlib.AbstractContextManager[Any]:
        """Tensors like these are made empty in the ``with`` block, to be read again and again:
        where they lie is the platform's to say.

        Raises:
            MemoryError: There is not so much.
        """
        return contextlib.nullcontext()

    def cache_budget(self, utilization: float, activation_bytes: int) -> int:
        """Bytes that the KV cache may take, once the weights are loaded.

        Args:
            utilization: Share (0 to 1] of the device's memory this engine may use in all.
            activation_bytes: What the largest step needs beyond the weights.
        """
        memory = self.memory_info()
        used = memory.total - memory.free
        return int(memory.total * utilization) - used - activation_bytes

    def cache_reason(self, utilization: float) -> str:
        """What :meth:`cache_budget` followed, for people."""
        return f"gpu_memory_utilization={utilization}"

    # ---- graphs --------------------------------------------------------------------------

    @property
    def has_graphs(self) -> bool:
        """Whether :meth:`new_graph` works here."""
        return self.graph_class is not None

    def graph_pool(self) -> Any:
        """A handle of a memory pool that several graphs may share."""
        raise GraphError(f"platform {self.name!r} has no device graphs; use graph_mode='none'")

    def graph_pool_memory(self, pool: Any) -> list[torch.Tensor]:
        """The pool's memory as uint8 tensors, so that it can be poisoned; [] if unknown.

        Between replays no graph relies on what they hold. Stale once more graphs are captured.
        """
        return []

    def capture_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Work of the ``with`` block goes to the one stream on which graphs are captured."""
        raise GraphError(f"platform {self.name!r} has no device graphs; use graph_mode='none'")

    def new_graph(self, pool: Any = None) -> DeviceGraph:
        """A device graph, not yet captured, with its own memory pool unless one is given."""
        raise GraphError(f"platform {self.name!r} has no device graphs; use graph_mode='none'")

    def compiler_missing(self) -> str | None:
        """Why models cannot be compiled for this platform here; None: they can."""
        return None if self.has_triton else "Triton, which the compiler emits, cannot run here"

    # ---- configuration -------------------------------------------------------------------

    def check_config(self, config: EngineConfig) -> tuple[EngineConfig, list[Adjustment]]:
        """Return ``config``, or an adjusted copy, with the reason for each change.

        Raises:
            ConfigError: The platform cannot run this configuration at all.
        """
        return config, []
