"""Has Triton's front end read the kernels that models of other sizes than ours would launch.

    python front_end.py bfloat16

The interpreter knows no types, and what is compiled for absent devices has the sizes of two models.
Prints one JSON object an op: its name, how many kernels were read, and what was refused.
"""

from __future__ import annotations

import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from compile_kernels import EmptyMaker, Unread, pretend_device
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction

from reprise.ops import all_ops
from reprise.ops.cases import Dimensions

MODELS = (
    Dimensions("14B", 5120, 40, 8, 128, 17408),  # inputs of more than 4,096, before a norm too
    Dimensions("SmolLM2", 576, 9, 3, 64, 1536),  # nothing is a power of two
)


def main(dtype: torch.dtype) -> None:
    pretend_device(GPUTarget("cuda", 90, 32), 232448)
    read: list[str] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.compile = compile_nothing
        return original(self, *args, **{**kwargs, "warmup": True})

    def compile_nothing(source: Any, target: Any = None, options: Any = None, **_: Any) -> Any:
        backend = make_backend(target)
        parsed = backend.parse_options({**(options or {}), **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        read.append(source.name)
        functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        source.make_ir(target, parsed, functions, modules, context)
        return SimpleNamespace(metadata=SimpleNamespace(shared=0), result=None)

    JITFunction.run = run
    make = EmptyMaker(torch.device("cpu"), dtype, models=MODELS)
    names = {each.name for each in MODELS}
    for op in all_ops().values():
        ours = [each for each in op.implementations.values() if each.compiles]
        wanted = op.cases.workloads(make) if ours else []
        refused = []
        read.clear()
        for workload, implementation in itertools.product(wanted, ours):
            if workload.shape.split(",")[0] not in names:
                continue
            arguments = workload.arguments()
            if implementation.refusal(**arguments) is not None:
                continue
            try:
                implementation.function(**arguments)
            except Exception as error:
                refused.append(f"{workload.shape}: {type(error).__name__}: {error}"[-1000:])
        if read:
            found = {"op": op.name, "read": len(read)}
            print(json.dumps({**found, "refused": refused}), flush=True)


if __name__ == "__main__":
    with Unread():
        main(getattr(torch, sys.argv[1]))
