"""Each symbol of torch that a platform relies on is there, with the signature that is used.

Runs without the devices: the modules import on any build. This is what stands between a platform
that cannot be tested here and an AttributeError on somebody's machine.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _pop_mode_temporarily

from reprise import platforms
from reprise.platforms.accelerator import AcceleratorPlatform

ACCELERATORS = ("cuda", "rocm", "xpu")
SOURCES = [
    Path(inspect.getfile(AcceleratorPlatform)).parent / name
    for name in ("accelerator.py", "device_graph.py", "borrow.py", "cuda.py", "rocm.py", "xpu.py")
]

MODULE_CALLS = {
    # What accelerator.py calls on the device module, and with which arguments.
    "get_device_name": ((0,), {}),
    "get_device_capability": ((0,), {}),
    "get_device_properties": ((0,), {}),
    "is_bf16_supported": ((), {}),
    "stream": ((None,), {}),
    "Stream": ((), {"device": 0}),
    "mem_get_info": ((0,), {}),
    "graph_pool_handle": ((), {}),
    "memory_snapshot": ((), {}),
    "memory_stats_as_nested_dict": ((0,), {}),
    "can_device_access_peer": ((0, 1), {}),
}
OPTIONAL = {"memory_snapshot", "memory_stats_as_nested_dict", "can_device_access_peer"}
"""Where it is missing, the platform does without."""

NEUTRAL_CALLS = {
    "is_available": (),
    "current_accelerator": (),
    "device_count": (),
    "set_device_index": (0,),
    "synchronize": (0,),
    "current_stream": (0,),
    "memory_allocated": (0,),
    "max_memory_allocated": (0,),
    "memory_reserved": (0,),
    "reset_peak_memory_stats": (0,),
    "empty_cache": (),
    "set_stream": (None,),
    "get_memory_info": (0,),
}


def device_module(name):
    return importlib.import_module(f"torch.{platforms.load(name).device_type}")


def fits(function, args, kwargs):
    """Whether the call is possible, as far as Python can tell without making it."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("symbol", MODULE_CALLS)
def test_device_modules_have_what_the_platform_calls(name, symbol):
    module = device_module(name)
    args, kwargs = MODULE_CALLS[symbol]
    found = getattr(module, symbol, None)
    if found is None and symbol in OPTIONAL:
        pytest.skip(f"torch {torch.__version__} has no {module.__name__}.{symbol}")
    assert callable(found), f"{module.__name__}.{symbol}"
    assert fits(found, args, kwargs), f"{module.__name__}.{symbol}{args}{kwargs}"


@pytest.mark.parametrize("symbol", NEUTRAL_CALLS)
def test_the_neutral_interface_has_what_the_platform_calls(symbol):
    found = getattr(torch.accelerator, symbol)
    assert fits(found, NEUTRAL_CALLS[symbol], {})


@pytest.mark.parametrize("name", ACCELERATORS)
def test_graph_classes(name):
    platform = platforms.load(name)
    graph = getattr(device_module(name), platform.graph_class)
    assert fits(graph, (), {})
    assert "pool" in inspect.signature(graph.capture_begin).parameters
    assert fits(graph.capture_begin, (None,), {"pool": (0, 0)})
    for method in (graph.capture_end, graph.replay):
        assert fits(method, (None,), {})


def test_the_neutral_graph_class_where_this_torch_has_it():
    graph = getattr(torch.accelerator, "Graph", None)
    if graph is None:
        pytest.skip(f"torch {torch.__version__} has no torch.accelerator.Graph")
    assert fits(graph, (), {"pool": (0, 0), "capture_error_mode": "thread_local"})
    for method in (graph.capture_begin, graph.capture_end, graph.replay):
        assert fits(method, (None,), {})


def test_private_helpers():
    memory = torch.zeros(8, dtype=torch.uint8)
    storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), memory.device, 8)
    assert storage.data_ptr() == memory.data_ptr()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert fits(torch._C._get_dispatch_stack_at, (0,), {})
    assert fits(_pop_mode_temporarily, (), {})
    for version in ("cuda", "hip", "xpu"):
        assert hasattr(torch.version, version)
    assert torch.Stream
    assert torch.Event
    assert fits(torch.get_device_module, ("cpu",), {})


def test_the_lists_above_are_complete():
    """Any further symbol that the sources come to use must be listed, and so checked."""
    module_calls, neutral = set(), set()
    modules = ("self.module()", "cls.module()", "platform.module()")
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                where, name = node.args[:2]
                if ast.unparse(where) in modules and isinstance(name, ast.Constant):
                    module_calls.add(name.value)
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node.value)
            if text in modules:
                module_calls.add(node.attr)
            elif text == "torch.accelerator":
                neutral.add(node.attr)
    assert module_calls <= set(MODULE_CALLS)
    assert neutral <= set(NEUTRAL_CALLS)


def test_rocm_and_xpu_are_data():
    """They hold class attributes and the test of the build; and of ROCm which eight-bit numbers a
    device has, which a test asks: nothing that could not be tested."""
    for name, more in (("rocm", {"fp8_dtype"}), ("xpu", set())):
        source = next(each for each in SOURCES if each.stem == name)
        (body,) = [n for n in ast.parse(source.read_text()).body if isinstance(n, ast.ClassDef)]
        methods = {each.name for each in body.body if isinstance(each, ast.FunctionDef)}
        assert methods == {"built_for_this", *more}


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("gfx942:sramecc+:xnack-", torch.float8_e4m3fnuz),
        ("gfx950", torch.float8_e4m3fn),
        ("gfx90a", None),
    ],
)
def test_which_eight_bit_numbers_rocm_has(monkeypatch, architecture, dtype):
    platform = object.__new__(platforms.load("rocm"))
    platform.index = 0
    properties = SimpleNamespace(gcnArchName=architecture)
    module = SimpleNamespace(get_device_properties=lambda index: properties)
    monkeypatch.setattr(type(platform), "module", lambda self: module)
    assert platform.fp8_dtype == dtype
