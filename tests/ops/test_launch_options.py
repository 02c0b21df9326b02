"""How kernels are launched on each platform: no option that its Triton backend does not know."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
        ((memory, torch.empty(1 << 29, device="meta"), 4, 0.5), {"BLOCK": 16, "FAST": True}),
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
