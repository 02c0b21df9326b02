"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprise.errors import OpError
from reprise.ops.handed_over import OnlyAsked, asking
from reprise.ops.launchers import load_apart
from reprise.ops.registry import active_platform, op_memory

load_apart()

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run in Python on the host (``TRITON_INTERPRET=1``), as in the tests on a CPU."""
_driver, _watchers = triton.runtime.driver, triton.knobs.runtime


class DeviceLimits(NamedTuple):
    """What a launcher may know about a device: numbers, never its name."""

    multiprocessors: int
    shared_memory: int
    """Bytes that one program can use."""
    warps: int = 16
    """Warps that one program can have."""


@functools.cache
def limits(device: torch.device) -> DeviceLimits:
    """Limits of ``device`` as Triton's driver reports them."""
    if INTERPRETED:
        return DeviceLimits(multiprocessors=2, shared_memory=64 * 1024)
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    # Every vendor allows 1,024 threads.
    most_warps = 1024 // found.get("warpSize", 64)
    return DeviceLimits(found["multiprocessor_count"], found["max_shared_mem"], most_warps)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs the host microseconds a call."""
    return -(-a // b)


def shares(tiles: int, steps: int, programs: float, device: torch.device) -> int:
    """Programs that share a tile, each with as many of its ``steps``: as many as there may be with
    ``programs`` on a multiprocessor."""
    most = max(1, programs * limits(device).multiprocessors // tiles)
    return max(n for n in range(1, steps + 1) if steps % n == 0 and n <= most)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


_IN_ORDER: Mapping[str, Any] = {"EARLY": False}
_EARLY: Mapping[str, Any] = {"EARLY": True, "launch_pdl": True}


APART: Mapping[str, Any] = {"enable_fp_fusion": False}
"""Of launches whose products and sums are not made into one that is rounded once: several kernels,
or parts of one, then compute the same with the same source."""


def launch_options(early: bool = True) -> Mapping[str, Any]:
    """For every launch of a kernel that calls :func:`depend`: its constant and its option.

    Args:
        early: Not where a kernel of this step has written what this one reads before that call.
    """
    platform = active_platform()
    if not early or INTERPRETED or platform is None or not platform.supports_pdl:
        return _IN_ORDER
    return _EARLY


def takes_ptx() -> bool:
    """Whether a kernel may have inline assembly in PTX, where it has another way too."""
    platform = active_platform()
    return not INTERPRETED and platform is not None and platform.takes_ptx


@triton.jit
def depend(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the kernel before, if this one was started early, and let the next one start.

    Before this call a kernel reads only what was there when the last kernel began that starts in
    order, as torch's do, and those that lay out a step (weights, lengths, tables, keys of older
    tokens: :class:`reprise.cache.Batch`), and writes nothing. Every program must make it: a kernel
    that ends has then waited, so whoever waits for it has waited for all kernels before it.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """The second half of :func:`depend`, for kernels that wait later by :func:`ended`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ended(EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait as :func:`depend` does, within a loop whose first loads need no wait; always true.

    A compiler that pipelines the loop moves loads to before it, but none that stands under this
    condition: it takes the answer for a value that only the wait can give.
    """
    if EARLY:
        zero = tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )
        return zero == 0
    return True


@triton.jit
def fetch(ptr, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ask for what lies there, to be in the last-level cache when it is read behind the wait."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [ptr],
            tl.int32,
            is_pure=False,
            pack=1,
        )


def arrivals(count: int, device: torch.device) -> Tensor:
    """At least ``count`` int32 zeros, in which programs that share work find out who is the last.

    A launch leaves them as zeros and touches them only behind :func:`depend`; an engine's launches
    run one after the other. So all kernels can use the same ones.
    """
    memory, name = op_memory(), _arrivals_name(count, device)
    found = memory.get(name)
    if found is None:
        size = _arrivals_size(count)
        found = memory[name] = torch.zeros(size, device=device, dtype=torch.int32)
    return found


def _arrivals_size(count: int) -> int:
    return max(8192, next_power_of_2(count))


@functools.cache
def _arrivals_name(count: int, device: torch.device) -> str:
    return f"{_arrivals_size(count)} arrivals on {device}"


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """a @ b + acc. The interpreter multiplies float32 correctly and bfloat16 as integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee" concerns float32 alone: no rounding to tf32.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def with_gain(x, gain, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Normalised float32 numbers times their gain, float32. A gain of ``dtype`` multiplies what has
    been rounded to it, one of float32 what has not: see the op ``rms_norm``."""
    if gain.dtype == dtype:
        x = x.to(dtype).to(tl.float32)
    return x * gain.to(tl.float32)


@triton.jit
def to_float8(x, dtype: tl.constexpr, ROUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 numbers within the range of ``dtype`` as e4m3, to nearest, ties to even.

    ROUND: the interpreter's conversion loses the carry of a mantissa that is rounded up, so it is
    given numbers that need no rounding."""
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        # Below the smallest normal number codes are 2 ** least apart.
        least: tl.constexpr = -9 if dtype == tl.float8e4nv else -10
        large: tl.constexpr = 1.5 * 2.0 ** (23 + least)
        small = tl.abs(x) < 2.0 ** (least + 3)
        near = (x + large) - large
        near = tl.where(near == 0, x * 0.0, near)  # a zero keeps its sign
        x = tl.where(small, near, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def silu(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """x * sigmoid(x) of float32, rounded to ``dtype`` as by an op of its own; float32."""
    return (x / (1 + tl.exp(-x))).to(dtype).to(tl.float32)


@triton.jit
def is_last(arrivals_ptr, count, done=1):  # type: ignore[no-untyped-def]
    """Whether the calling program, which has ``done`` so many parts of ``count``, brings the last
    ones: see :func:`arrivals`.

    The last one may read what the others stored before their calls."""
    # All threads have stored before one announces it.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr, done, sem="acq_rel") == count - done
    if last:
        tl.store(arrivals_ptr, 0)
    return last


_MOST_LAUNCHES = 4096
"""Of one kind to remember; steps of ever new sizes would make ever more."""
_WIDE = 1 << 31
"""Bytes of memory from which 32 bits do not address it."""
_pointer, _dtype = Tensor.data_ptr, attrgetter("dtype")
_storage, _nbytes = Tensor.untyped_storage, torch.UntypedStorage.nbytes
Again = Callable[..., None]
"""Repeats a launch: takes the arguments again without the options. Tensors may be others of equal
dtype and alignment; numbers must be the same."""


class _Compiled(NamedTuple):
    """A kernel compiled for one set of arguments, and what a launch of it needs."""

    kernel: Any
    constants: tuple[Any, ...]
    """Its last arguments, which are options of the launch."""
    device: int
    run: Callable[..., None]
    function: Any
    packed: Any


class _Kind:
    """Launches of one kernel with arguments of the same types and options of the same names."""

    __slots__ = ("known", "numbers", "tensors")

    def __init__(self, args: Sequence[Any]) -> None:
        self.tensors = [isinstance(each, Tensor) for each in args]
        self.numbers = [not each for each in self.tensors]
        self.known: dict[tuple[Any, ...], _Compiled] = {}
        """By what else a compilation may depend on."""


_kinds: dict[tuple[Any, ...], _Kind] = {}
_turns: dict[tuple[Any, ...], threading.Lock] = {}
"""By kernel and options: of threads that come with the same ones at once, one compiles."""


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Again]:
    """``kernel[grid]``: a function that launches, and returns one that does so again.

    What Triton does in Python for each launch is most of what the host does in an eager step: it
    finds out which compilation suits the arguments, and makes up what profilers might ask. Here it
    is asked once for each set of arguments: those that agree in all that a compilation may depend
    on, the values of numbers included.

    Args:
        kernel: The ``triton.jit`` function.
        grid: Programs along each dimension.

    Raises:
        OpError: By what is returned, where it would have the kernel loaded for another device than
            the tensors': a kernel runs on the thread's device.
    """
    return functools.partial(_launch, kernel, grid)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Again:
    if INTERPRETED:
        kernel[grid](*args, **options)
        return functools.partial(kernel[grid], **options)
    if asking and threading.get_ident() in asking:
        with contextlib.suppress(OnlyAsked):
            kernel.warmup(*args, grid=grid, **options)
        return lambda *again: None
    # Every launch of an eager step comes this way; what is mapped costs half of what a loop does.
    name = (id(kernel), *map(type, args), *options)
    kind = _kinds.get(name)
    if kind is None:
        kind = _kinds[name] = _Kind(args)
    tensors = tuple(compress(args, kind.tensors))
    # All compilers look at a tensor's alignment, and some at whether 32 bits address its memory:
    # all of it, of which it may be a small part with rows that lie far apart.
    odd: Any = 0
    for each in map(_pointer, tensors):
        odd |= each
    odd &= 15
    if odd:
        odd = tuple([each & 15 for each in map(_pointer, tensors)])
    platform, wide = active_platform(), None
    if platform is None or platform.compiles_by_storage:
        wide = tuple([_nbytes(_storage(each)) >= _WIDE for each in tensors])
    device = tensors[0].get_device()
    numbers = compress(args, kind.numbers)
    key = (device, odd, wide, *map(_dtype, tensors), *numbers, *options.values())
    known = kind.known.get(key)
    if known is not None:
        _start(known, grid, *args)
        return functools.partial(_start, known, grid)
    here = _driver.active.get_current_device() if device >= 0 else device
    if here != device:
        raise OpError(
            f"{kernel.__name__}: the tensors are on device {device}, and this thread's kernels run "
            f"on device {here}: call torch.accelerator.set_device_index({device}) first"
        )
    with _turns.setdefault((id(kernel), *options.values()), threading.Lock()):
        compiled = kernel[grid](*args, **options)
    if len(kind.known) >= _MOST_LAUNCHES:
        kind.known.clear()
    constants = tuple([options[name] for name in kernel.arg_names[len(args) :]])
    known = kind.known[key] = _Compiled(
        compiled, constants, device, compiled.run, compiled.function, compiled.packed_metadata
    )
    return functools.partial(_start, known, grid)


def _start(known: _Compiled, grid: tuple[int, ...], *args: Any) -> None:
    """Launch as ``triton.jit`` functions do, on the current stream."""
    kernel, constants, device, run, function, packed = known
    enter, leave = _watchers.launch_enter_hook, _watchers.launch_exit_hook
    grid = (*grid, 1, 1)[:3]
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # of a profiler
        kernel[grid](*args, *constants)
        return
    stream = _driver.active.get_current_stream(device)
    run(*grid, stream, function, packed, None, None, None, *args, *constants)


def warps(elements: int, per_thread: int = 8, most: int = 16) -> int:
    """Warps of 32 threads for ``elements`` at ``per_thread`` each: a power of two to ``most``."""
    return min(most, max(1, next_power_of_2(elements // (32 * per_thread))))
