"""How kernels are launched on each platform: no option that its Triton backend does not know."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from reprise.errors import OpError
from reprise.ops import OpTable, triton_util
from reprise.platforms import _BUILT_IN, load

IN_ORDER = {"EARLY": False}
EARLY = {"EARLY": True, "launch_pdl": True}
CASES: list[tuple[str, tuple[int, int] | None, Mapping[str, bool]]] = [
    ("cpu", None, IN_ORDER),
    ("xpu", None, IN_ORDER),
    ("rocm", (9, 4), IN_ORDER),
    ("rocm", (12, 0), IN_ORDER),
    ("cuda", (8, 0), IN_ORDER),
    ("cuda", (8, 9), IN_ORDER),
    ("cuda", (9, 0), EARLY),
    ("cuda", (12, 0), EARLY),
]
"""Platform, what its driver calls the device's capability, options."""


def test_every_platform_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(_BUILT_IN)


@pytest.mark.parametrize(("name", "capability", "options"), CASES)
def test_launch_options(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: Any, options: Mapping[str, bool]
) -> None:
    class Device(load(name)):  # type: ignore[misc]
        has_triton = False  # nothing is compiled here

        @classmethod
        def module(cls) -> Any:
            class Module:
                @staticmethod
                def get_device_capability(index: int) -> Any:
                    return capability

            return Module

    monkeypatch.setattr(triton_util, "INTERPRETED", False)
    with OpTable(Device()).activate():
        assert triton_util.launch_options() == options
        assert triton_util.launch_options(early=False) == IN_ORDER


def test_launch_options_outside_an_engine_and_under_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Device(load("cuda")):  # type: ignore[misc]
        has_triton = False
        supports_pdl = True

    monkeypatch.setattr(triton_util, "INTERPRETED", False)
    assert triton_util.launch_options() == IN_ORDER
    monkeypatch.setattr(triton_util, "INTERPRETED", True)
    with OpTable(Device()).activate():
        assert triton_util.launch_options() == IN_ORDER


def test_a_launch_asks_the_compiler_once_for_each_set_of_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a compilation may depend on makes another set, and each runs with all arguments."""
    monkeypatch.setattr(triton_util, "INTERPRETED", False)
    asked: list[Any] = []
    ran: list[Any] = []

    class Compiled:
        function, packed_metadata = "function", (4, 1, 0)

        def run(self, *args: Any) -> None:
            ran.append(args)

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: ran.append(("watched", grid, args))

    class Kernel:
        arg_names = ("x_ptr", "bias_ptr", "size", "eps", "BLOCK", "FAST")

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any, **options: Any) -> Compiled:
                asked.append(args)
                return Compiled()

            return run

    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    monkeypatch.setattr(triton_util, "_driver", streams)
    kernel, memory = Kernel(), torch.zeros(64)
    sets = [
        ((memory, memory, 4, 0.5), {"BLOCK": 16, "FAST": True}),
        ((memory, memory[1:], 4, 0.5), {"BLOCK": 16, "FAST": True}),  # another alignment
        ((memory.int(), memory, 4, 0.5), {"BLOCK": 16, "FAST": True}),
        # 32 bits do not address its memory
        ((memory, torch.empty(1 << 29, device="meta")[:64], 4, 0.5), {"BLOCK": 16, "FAST": True}),
        ((memory, None, 4, 0.5), {"BLOCK": 16, "FAST": True}),
        ((memory, memory, 1, 0.5), {"BLOCK": 16, "FAST": True}),
        ((memory, memory, True, 0.5), {"BLOCK": 16, "FAST": True}),
        ((memory, memory, 1.0, 0.5), {"BLOCK": 16, "FAST": True}),
        ((memory, memory, 4, 0.25), {"BLOCK": 16, "FAST": True}),
        ((memory, memory, 4, 0.5), {"BLOCK": 32, "FAST": True}),
        ((memory, memory, 4, 0.5), {"BLOCK": 16, "FAST": False}),
        ((memory, memory, 4, 0.5), {"BLOCK": 16, "FAST": True, "num_warps": 8}),
    ]
    for args, options in sets:
        triton_util.launch(kernel, (2,))(*args, **options)
    assert len(asked) == len(sets)
    assert not ran
    for args, options in sets:
        triton_util.launch(kernel, (3,))(*args, **options)
    assert len(asked) == len(sets)
    for got, (args, options) in zip(ran, sets, strict=True):
        assert got[:9] == (3, 1, 1, 7, "function", (4, 1, 0), None, None, None)
        expected = (*args, options["BLOCK"], options["FAST"])
        assert all(a is b for a, b in zip(got[9:], expected, strict=True))
    # Who watches launches sees them, those too that are only repeated.
    again = triton_util.launch(kernel, (3,))(*sets[0][0], **sets[0][1])
    seen = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton_util._watchers, "launch_exit_hook", seen)
    ran.clear()
    again(*sets[0][0])
    assert ran == [("watched", (3, 1, 1), (*sets[0][0], 16, True))]


@pytest.mark.parametrize(
    ("name", "target"),
    [("cuda", ("cuda", 90, 32)), ("rocm", ("hip", "gfx942", 64)), (None, ("hip", "gfx942", 64))],
)
def test_no_launch_runs_what_triton_compiled_for_other_arguments(
    name: str | None, target: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own compilers are asked, of the version that is installed; None: outside of an
    engine. Rows that lie far apart are few bytes, and 32 bits do not reach from one to the next."""
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends import backends

    backend = backends["nvidia" if target[0] == "cuda" else "amd"].compiler(GPUTarget(*target))
    monkeypatch.setattr(triton_util, "INTERPRETED", False)
    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    monkeypatch.setattr(triton_util, "_driver", streams)

    def specialised(args: Any) -> list[Any]:
        return [jit.native_specialize_impl(backend, each, False, True, True) for each in args]

    class Kernel:
        arg_names = ("x_ptr", "size")

        def __getitem__(self, grid: Any) -> Any:
            def run(*args: Any) -> Any:
                made_for = specialised(args)

                def again(*launch: Any) -> None:
                    assert specialised(launch[9:]) == made_for

                return SimpleNamespace(run=again, function=0, packed_metadata=())

            return run

    large = torch.empty(2, 1 << 29, device="meta")
    tensors = [
        torch.empty(2, 8), torch.empty(2, 8)[:, 1:], large, large[:, :8], large[:, 4:12],
        torch.empty(1, device="meta").expand(1 << 30), torch.empty(2, 8).half(), torch.empty(0),
    ]  # fmt: skip
    numbers = [
        0,
        1,
        5,
        16,
        -16,
        (1 << 31) - 1,
        1 << 31,
        -(1 << 31),
        1 << 63,
        True,
        False,
        1.0,
        16.0,
    ]
    calls = [(x, n) for x in tensors for n in numbers]

    class Device(load(name or "rocm")):  # type: ignore[misc]
        has_triton = False

    kernel = Kernel()
    with contextlib.nullcontext() if name is None else OpTable(Device()).activate():
        for first in (calls, calls[::-1]):
            triton_util._kinds.clear()
            for args in first * 2:
                triton_util.launch(kernel, (1,))(*args)


def test_nothing_is_loaded_for_another_device_than_the_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be what later launches of the device find."""

    class OnTheSecond(torch.Tensor):
        def get_device(self) -> int:
            return 1

    class Kernel:
        __name__, arg_names = "some_kernel", ("x_ptr",)

        def __getitem__(self, grid: Any) -> Any:
            loaded.append(current[0])
            return lambda x: SimpleNamespace(run=ran, function=current[0], packed_metadata=())

    def ran(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        assert (stream, function) == (71, 1)

    loaded: list[int] = []
    current = [0]
    driver = SimpleNamespace(
        get_current_device=lambda: current[0], get_current_stream=lambda device: 70 + device
    )
    monkeypatch.setattr(triton_util, "INTERPRETED", False)
    monkeypatch.setattr(triton_util, "_driver", SimpleNamespace(active=driver))
    kernel, x = Kernel(), torch.zeros(4).as_subclass(OnTheSecond)
    with pytest.raises(OpError, match=r"some_kernel: the tensors are on device 1, .* device 0"):
        triton_util.launch(kernel, (1,))(x)
    current[0] = 1
    for _ in range(2):
        triton_util.launch(kernel, (1,))(x)(x)
    assert loaded == [1]


def test_launches_are_started_as_triton_starts_them(compiling) -> None:
    compiling("started_as_triton.py")
