"""``torch.sim``: what torch's device modules have, for this device.

What every accelerator has is in ``torch.accelerator`` and in ``torch.Stream`` and ``torch.Event``;
here is only what torch looks for in a device module, and what a test asks of the simulation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

core: Any = None
"""The extension; set when the device is registered."""


# ---- what torch looks for -------------------------------------------------------------------


def device_count() -> int:
    return int(core.device_count())


def current_device() -> int:
    return int(core.current_device())


def set_device(index: int) -> None:
    core.set_device(index)


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _lazy_init() -> None:
    """Nothing is left for the first use."""


def _is_in_bad_fork() -> bool:
    return False


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        core.manual_seed(index, seed % (1 << 64))


def graph_pool_handle() -> tuple[int, int]:
    return tuple(core.new_pool())  # type: ignore[return-value]


def memory_snapshot() -> list[dict[str, Any]]:
    """Of each piece of device memory ``device``, ``address``, ``total_size``,
    ``segment_pool_id``."""
    return list(core.segments())


class SimGraph:
    """A graph where this torch has no ``torch.accelerator.Graph``."""

    def __new__(cls) -> Any:
        return core.Graph()


def __getattr__(name: str) -> Any:
    # The compiler takes seconds to import, and asks for these when it is first used.
    if name in ("Scheduling", "PythonWrapperCodegen", "CppWrapperCodegen", "WrapperFxCodegen"):
        from reprise_sim import compiler

        return compiler.EXPORTS[name]
    raise AttributeError(f"torch.sim has no {name}")


# ---- what a test asks -----------------------------------------------------------------------


def configure(**settings: Any) -> None:
    """Change how the device behaves, once all work has been done.

    Args:
        seed: Of the delays; 0: there are none.
        races: Look for accesses that no event orders.
        memory: Bytes that each device has.
        timeout: Seconds after which a wait is an error that names what it waits for.
        numbers: Of free memory: ``exact``, ``late``, ``negative`` or ``lost``.
    """
    core.configure(**settings)


@contextlib.contextmanager
def configured(**settings: Any) -> Iterator[None]:
    """:func:`configure` within the ``with`` block."""
    before = dict(core.settings())
    core.configure(**settings)
    try:
        yield
    finally:
        core.configure(**{name: before[name] for name in settings})


def races(*, clear: bool = False) -> list[str]:
    """What was found since races are looked for, one sentence for two places in the code."""
    return list(core.races(clear))


def launch(
    name: str, function: Callable[..., Any], arguments: Sequence[Any], written: Sequence[int]
) -> None:
    """Queue ``function(*arguments)`` as one kernel, which sees the tensors as the CPU's.

    Args:
        written: Places of the arguments that it writes.
    """
    core.launch(name, function, tuple(arguments), list(written))
