"""torch's compiler for this device: the CPU's loops in C++, each of which is one launch.

torch asks the device module for ``Scheduling`` and its fellows when something is first compiled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._inductor import config as inductor_config
from torch._inductor.codegen.common import DeviceOpOverrides, register_device_op_overrides
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.codegen.wrapper_fxir import WrapperFxCodegen

from reprise_sim import device


def queued(name: str, kernel: Any, written: list[int]) -> Callable[..., None]:
    """A kernel that is queued when it is called; compiled code calls it by this name.

    Args:
        kernel: The compiler's, or its promise of one.
        written: Places of the arguments that it writes.
    """

    def launch(*args: Any) -> None:
        function = kernel.result() if hasattr(kernel, "result") else kernel
        device.launch(name, function, args, written)

    return launch


class _Wrapper(PythonWrapperCodegen):
    """Host code that queues its kernels."""

    @staticmethod
    def create(is_subgraph: bool, *args: Any, **kwargs: Any) -> PythonWrapperCodegen:
        if is_subgraph:
            return PythonWrapperCodegen.create(is_subgraph, *args, **kwargs)
        return _Wrapper()

    def write_header(self) -> None:
        super().write_header()
        self.imports.writeline("from reprise_sim.compiler import queued")

    def define_kernel(self, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> None:
        found = re.match(r"async_compile\.cpp_pybinding\((\[.*?\]), ", kernel_body)
        assert found is not None, kernel_body
        types = ast.literal_eval(found[1])
        written = [i for i, each in enumerate(types) if "*" in each and "const" not in each]
        body = f"queued({kernel_name!r}, {kernel_body.rstrip()}, {written})"
        super().define_kernel(kernel_name, body, *args, **kwargs)

    def _generate_kernel_call_helper(self, kernel_name: str, call_args: Any, **_: Any) -> None:
        self.writeline(self.wrap_kernel_call(kernel_name, call_args))


class _Lines(DeviceOpOverrides):
    """Lines of generated host code."""

    def import_get_raw_stream_as(self, name: str) -> str:
        return f"def {name}(_):\n    return 0\n"

    def set_device(self, device_idx: int) -> str:
        return f"torch.accelerator.set_device_index({device_idx})"

    def synchronize(self) -> str:
        return "torch.accelerator.synchronize()"

    def device_guard(self, device_idx: int) -> str:
        return f"torch.accelerator.device_index({device_idx})"


class _Interface(DeviceInterface):
    """What the compiler asks of a device while it compiles."""

    Event = torch.Event
    Stream = torch.Stream
    device_count = staticmethod(device.device_count)
    current_device = staticmethod(device.current_device)
    set_device = staticmethod(device.set_device)
    is_available = staticmethod(device.is_available)

    @staticmethod
    def get_device_properties(device: Any = None) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=1)

    @staticmethod
    def get_compute_capability(device: Any = None) -> str:
        return ""

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True


# torch takes what it writes for a device that it does not know for what it writes for CUDA's.
inductor_config.cuda_backend = "cpp"  # type: ignore[assignment]
register_device_op_overrides("sim", _Lines())
register_interface_for_device("sim", _Interface)

EXPORTS: dict[str, Any] = {
    "Scheduling": CppScheduling,
    "PythonWrapperCodegen": _Wrapper,
    # Of code compiled ahead of time and of a form that nobody asks for; torch wants them named.
    "CppWrapperCodegen": CppWrapperCpu,
    "WrapperFxCodegen": WrapperFxCodegen,
}
