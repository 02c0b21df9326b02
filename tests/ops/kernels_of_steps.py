"""Prints which kernels steps of many sizes launch that no pass before the first step does.

    python kernels_of_steps.py

The model has a layer of each kind of DeepSeek-V4 at Flash's widths, on a device that is not there.
Nothing is computed or compiled: kernels are told apart by what Triton compiles anew for. One JSON
object: sizes of steps, with the names of the kernels that are new to each.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compile_kernels import pretend_device
from torch import Tensor
from triton.backends.compiler import GPUTarget

from reprise import LLM
from reprise.bench.presets import CONFIGS
from reprise.graphs import parse_plan
from reprise.graphs.buckets import default_buckets
from reprise.ops import Op, triton_util
from reprise.ops.registry import intercept
from reprise.runner.examples import Examples
from reprise.shape import StepShape

REQUESTS, TOKENS = 64, 8192
known: set[Any] = set()
new: list[str] = []


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    def note(*args: Any, **options: Any) -> Callable[..., None]:
        key = (kernel.__name__, *map(kind, args), *sorted((k, str(v)) for k, v in options.items()))
        if key not in known:
            known.add(key)
            new.append(kernel.__name__)
        return lambda *others: None

    return note


def kind(value: Any) -> Any:
    """What of an argument makes for another kernel; numbers that a kernel has as they come too."""
    return value.dtype if isinstance(value, Tensor) else type(value)


def call(op: Op, function: Any, args: Any, kwargs: Any) -> Any:
    kernels = op.implementations.get("triton")
    if kernels is not None:
        named = inspect.signature(op.implementations["reference"].function).bind(*args, **kwargs)
        named.apply_defaults()
        if kernels.refusal(**named.arguments) is None:
            kernels.function(*args, **kwargs)
    return op.fake(*args, **kwargs)


def main() -> None:
    values = json.loads((CONFIGS / "deepseek-v4-flash" / "config.json").read_text())
    values |= {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1,
               "n_routed_experts": 8, "vocab_size": 512}  # fmt: skip
    found: list[Examples] = []

    def compiling_kernels(self: Examples) -> contextlib.AbstractContextManager[Any]:
        found.append(self)
        return contextlib.nullcontext(SimpleNamespace(ready=bool))

    Examples.compiling_kernels = compiling_kernels  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(values))
        runner = LLM(
            directory, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            device="cpu", graph_mode="none", max_num_seqs=REQUESTS, max_model_len=4096,
            max_num_batched_tokens=TOKENS, kv_cache_memory_bytes=1 << 29,
        ).engine.runner  # fmt: skip
    pretend_device(GPUTarget("cuda", 90, 32), 232448)
    triton_util.launch = launch
    with torch.inference_mode(), runner.ops.computing(), intercept(call):
        for each in (*found[0]._passes(), *found[0]._smallest()):
            each()
        assert new
        for shape in (
            *default_buckets(REQUESTS, TOKENS).shapes(parse_plan("full"), (1,), REQUESTS),
            *(StepShape.mixed(n, min(n, REQUESTS)) for n in (TOKENS, TOKENS // 2, 64, 16)),
        ):
            new.clear()
            runner.forward_pass.pad(shape.empty, shape)
            runner.forward_pass.forward(shape)
            print(json.dumps({"phase": shape.phase, "size": shape.size, "new": sorted(new)}))


if __name__ == "__main__":
    main()
