"""Prints in which order kernels read their arguments and wait, as compiled for Hopper.

    python read_early.py

One JSON object a kernel: its name, and what it does with global memory in the order of the code:
``read NAME`` and ``write NAME`` of an argument, and ``wait`` for the kernel before.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from compile_kernels import pretend_device
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

DTYPE = torch.bfloat16


def main() -> None:
    pretend_device(GPUTarget("cuda", 90, 32), 232448)
    original = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = original(self, *args, **{**kwargs, "warmup": True})
        names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        print(json.dumps({"kernel": self.__name__, "does": order(compiled.asm["ptx"], names)}))
        return compiled

    JITFunction.run = run
    # What is launched is known when launchers are imported.
    from reprise.ops.linear import triton as plain
    from reprise.ops.paged_attention.triton import paged_attention
    from reprise.ops.rotary_cache.triton import rotary_cache

    ints, places = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    caches = some(9, 16, 8, 128), some(9, 16, 8, 128)
    angles = some(64, 128, dtype=torch.float32)
    gains = some(128), some(128)
    rotary_cache(some(1, 6144), places, angles, places, *caches, *gains, 1e-6)
    tables = torch.zeros(1, 256, dtype=torch.int32)
    query = some(1, 32, 128)
    paged_attention(
        query, *caches, tables, ints[:1], ints, query, 0.1, 0, 0.0, 1, None, None, 0
    )  # fmt: skip
    plain.linear_add(some(1, 2048), some(1024, 2048), None, some(1, 1024))
    plain.norm_linear(some(1, 2048), some(2048), 1e-6, some(1024, 2048), None)


def some(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def order(ptx: str, names: list[str]) -> list[str]:
    """Registers that an argument went into are that argument's; what was read is nobody's."""
    whose: dict[str, str] = {}
    found: list[str] = []
    for line in ptx.splitlines():
        line = line.split("//")[0].strip()
        loaded = re.match(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line)
        used = re.findall(r"%\w+", line)
        if loaded and int(loaded[2]) < len(names):
            whose[loaded[1]] = names[int(loaded[2])]
        elif "griddepcontrol.wait" in line:
            found.append("wait")
        elif re.search(r"\b(ld\.global|cp\.async\S*global|st\.global)", line):
            address = re.findall(r"\[\s*(%\w+)", line)[-1]
            kind = "write" if "st.global" in line else "read"
            found.append(f"{kind} {whose.get(address, '?')}")
        elif re.match(r"(@!?%\w+ )?(add|mad|mov|cvta|selp|sub)\S*\s", line) and used:
            target, *sources = [each for each in used if not line.startswith(f"@{each}")]
            owners = {whose[each] for each in sources if each in whose}
            whose.pop(target, None)
            if len(owners) == 1:
                whose[target] = owners.pop()
    return [each for n, each in enumerate(found) if n == 0 or each != found[n - 1]]


if __name__ == "__main__":
    main()
