"""Checks every Triton kernel against its reference on real shapes, and times it.

    python benchmarks/kernels.py                     # all ops
    python benchmarks/kernels.py --only paged sample # those whose name contains one of these

Shapes are those of Qwen3-0.6B and Qwen3-8B in bfloat16, and for attention of a model with narrow
heads. Times are of replays of a device graph that holds many calls, over several copies of the
inputs where one would stay in the cache. The last column is the share of what this device reached
in the same run: bytes moved by a large copy, or operations of a large matrix product.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reprise import platforms
from reprise.ops import OpTable, all_ops
from reprise.platforms import Platform

BLOCK_SIZE = 16
EPS = 1e-6
DTYPE = torch.bfloat16
CACHE_BYTES = 256 << 20
"""Inputs of calls in a row are copies that together exceed a last-level cache."""


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int = 151936


SMALL = Model("0.6B", 1024, 16, 8, 128, 3072)
LARGE = Model("8B", 4096, 32, 8, 128, 12288)
NARROW = Model("heads of 64", 2048, 32, 8, 64, 8192, 128256)
"""Llama 3.2 1B's shapes, for attention."""


@dataclass
class Case:
    """One line of the table."""

    op: str
    shape: str
    arguments: Callable[[], dict[str, Any]]
    """Makes a new copy of the inputs."""
    read_write: int = 0
    """Bytes that any implementation must move."""
    operations: int = 0
    outputs: tuple[str, ...] = ()
    """Arguments to compare beside the result."""
    exact: bool = False
    """Results must be equal in all but one of a thousand elements."""
    check: bool = True


class Bench:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.device = platform.device

    def randn(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=dtype)

    # ---- timing --------------------------------------------------------------------------

    def seconds(self, calls: list[Callable[[], Any]]) -> float:
        """Median time of one of ``calls``, by replays of a graph that makes all of them."""

        def run() -> None:
            for call in calls:
                call()

        run()
        self.platform.synchronize()
        graph = self.platform.new_graph()
        graph.capture(run)
        times = []
        for _ in range(15):
            begin, end = (self.platform.event(timing=True) for _ in range(2))
            begin.record(self.platform.current_stream())
            graph.replay()
            end.record(self.platform.current_stream())
            self.platform.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times[3:])

    def copies(self, case: Case) -> list[dict[str, Any]]:
        """Enough copies of a case's inputs that their bytes exceed the cache; at most 64."""
        first = case.arguments()
        size = sum(x.nbytes for x in first.values() if isinstance(x, Tensor) and x.dim() < 4)
        size = max(size, case.read_write, 1)
        count = min(64, math.ceil(CACHE_BYTES / size))
        return [first, *(case.arguments() for _ in range(count - 1))]

    def ceilings(self) -> tuple[float, float]:
        """Bytes per second of a copy, and operations per second of a matrix product."""
        source = self.randn(1 << 30)
        target = torch.empty_like(source)
        # By a kernel: inside a graph, copy_() would go to a slower copy engine.
        copy = self.seconds([lambda: torch.neg(source, out=target)] * 4)
        a, b = self.randn(8192, 8192), self.randn(8192, 8192)
        product = self.seconds([lambda: torch.mm(a, b, out=a.new_empty(8192, 8192))] * 4)
        return 2 * source.nbytes / copy, 2 * 8192**3 / product

    # ---- cases ---------------------------------------------------------------------------

    def cases(self) -> Iterator[Case]:
        for model in (SMALL, LARGE):
            for tokens in (1, 64, 8192):
                yield from self.elementwise(model, tokens)
            for tokens in (1, 8, 64):
                yield from self.products(model, tokens)
        for model, length, requests in [
            (LARGE, 32768, 1), (LARGE, 16384, 8), (LARGE, 1024, 64), (LARGE, 2000, 128),
            (LARGE, 512, 1), (SMALL, 4096, 16), (LARGE, 272, 64), (SMALL, 800, 128),
        ]:  # fmt: skip
            yield self.attention(model, [length] * requests, 1, f"decode {requests} x {length}")
        ragged = [100_000, *[1000] * 31]
        yield self.attention(LARGE, ragged, 1, "decode 1 x 100000 + 31 x 1000")
        yield self.attention(LARGE, [16384], 4, "verify 1 x 16384, 4 tokens each")
        yield self.attention(LARGE, [8192], 8192, "prefill 8192")
        yield self.attention(SMALL, [8192], 8192, "prefill 8192")
        yield self.attention(LARGE, [2048] * 4, 2048, "prefill 4 x 2048")
        yield self.attention(LARGE, [32768], 2048, "chunk of 2048 at 32768")
        yield self.attention(NARROW, [8192], 8192, "prefill 8192")
        yield self.attention(NARROW, [2048] * 4, 2048, "prefill 4 x 2048")
        yield from self.sampling()

    def elementwise(self, model: Model, tokens: int) -> Iterator[Case]:
        def case(op: str, arguments: Callable[[], dict[str, Any]], elements: int, **more: Any):
            return Case(op, f"{model.name}, T={tokens}", arguments, 2 * elements * tokens, **more)

        hidden, heads, size = model.hidden, model.heads + 2 * model.kv_heads, model.head_size
        yield case(
            "rms_norm",
            lambda: {"x": self.randn(tokens, hidden), "weight": self.randn(hidden), "eps": EPS},
            2 * hidden,
        )
        yield case(
            "silu_and_mul",
            lambda: {"x": self.randn(tokens, 2 * model.intermediate)},
            3 * model.intermediate,
        )

        def rotary() -> dict[str, Any]:
            blocks = tokens // BLOCK_SIZE + 2
            cache = (blocks, BLOCK_SIZE, model.kv_heads, size)
            slots = torch.randperm((blocks - 1) * BLOCK_SIZE, device=self.device)[:tokens]
            return {
                "qkv": self.randn(tokens, heads * size),
                "positions": torch.arange(tokens, device=self.device),
                "cos_sin": self.randn(max(tokens, 4096), size, dtype=torch.float32),
                "slot_mapping": slots + BLOCK_SIZE,
                "key_cache": torch.zeros(cache, device=self.device, dtype=DTYPE),
                "value_cache": torch.zeros(cache, device=self.device, dtype=DTYPE),
                "query_norm": self.randn(size),
                "key_norm": self.randn(size),
                "eps": EPS,
            }

        yield case("rotary_cache", rotary, 2 * heads * size, outputs=("key_cache", "value_cache"))

    def products(self, model: Model, tokens: int) -> Iterator[Case]:
        """The four products of a layer; their weights are all that a step must read."""
        hidden, heads = model.hidden, model.heads + 2 * model.kv_heads

        def case(op: str, features: int, inputs: int) -> Case:
            def arguments() -> dict[str, Any]:
                found = {
                    "x": self.randn(tokens, inputs),
                    "weight": self.randn(features, inputs) / inputs**0.5,
                    "bias": None,
                }
                if op == "linear_add":
                    return {**found, "residual": self.randn(tokens, features)}
                return {**found, "norm_weight": self.randn(inputs), "eps": EPS}

            return Case(
                op,
                f"{model.name}, T={tokens}, {inputs} to {features}",
                arguments,
                2 * features * inputs,
                outputs=("residual",) if op == "linear_add" else (),
            )

        yield case("norm_linear", heads * model.head_size, hidden)
        yield case("linear_add", hidden, model.heads * model.head_size)
        yield case("norm_gated_linear", 2 * model.intermediate, hidden)
        yield case("linear_add", hidden, model.intermediate)

    def attention(self, model: Model, lengths: list[int], new: int, shape: str) -> Case:
        """``new`` new tokens of each request, blocks scattered over the cache."""
        counts = [math.ceil(length / BLOCK_SIZE) for length in lengths]
        requests, tokens = len(lengths), new * len(lengths)

        def arguments() -> dict[str, Any]:
            order = torch.randperm(sum(counts), device=self.device) + 1
            tables = torch.zeros(
                requests, max(*counts, 40960 // BLOCK_SIZE), device=self.device, dtype=torch.int32
            )
            for row, blocks in enumerate(order.split(counts)):
                tables[row, : len(blocks)] = blocks
            cache = (sum(counts) + 1, BLOCK_SIZE, model.kv_heads, model.head_size)
            query = self.randn(tokens, model.heads, model.head_size)
            return {
                "query": query,
                "key_cache": self.randn(*cache),
                "value_cache": self.randn(*cache),
                "block_tables": tables,
                "seq_lens": self.ints(lengths),
                "query_start_loc": self.ints(range(0, tokens + 1, new)),
                "out": torch.full_like(query, torch.nan),
                "scale": model.head_size**-0.5,
                "sliding_window": 0,
                "soft_cap": 0.0,
                "query_len": new,
            }

        kv_bytes = 2 * 2 * sum(lengths) * model.kv_heads * model.head_size
        pairs = sum(new * (length - new) + new * (new + 1) // 2 for length in lengths)
        bound = {"read_write": kv_bytes}
        if new > 64:
            bound = {"operations": 4 * pairs * model.heads * model.head_size}
        return Case(
            "paged_attention", f"{model.name}, {shape}", arguments, outputs=("out",), **bound
        )

    def sampling(self) -> Iterator[Case]:
        kinds = {
            "greedy": {"temperature": 0.0},
            "unfiltered": {},
            "top-k 50": {"top_k": 50},
            "top-p 0.9": {"top_p": 0.9},
            "top-k 20, top-p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
            "min-p 0.05": {"min_p": 0.05},
            "flat, top-p 0.9": {"spread": 0.3, "top_p": 0.9},
        }
        for rows in (1, 64, 256):
            yield Case(
                "argmax",
                f"R={rows}",
                lambda rows=rows: {"logits": self.randn(rows, LARGE.vocab)},
                2 * rows * LARGE.vocab,
                exact=True,
            )
        for rows in (1, 64):
            yield self.penalties(rows)
            for name, kind in kinds.items():

                def arguments(rows: int = rows, kind: dict[str, Any] = kind) -> dict[str, Any]:
                    def full(field: str, default: float, dtype: torch.dtype) -> Tensor:
                        value = kind.get(field, default)
                        return torch.full((rows,), value, device=self.device, dtype=dtype)

                    logits = self.randn(rows, LARGE.vocab, dtype=torch.float32)
                    return {
                        "logits": logits * kind.get("spread", 3.0),
                        "temperature": full("temperature", 1.0, torch.float32),
                        "top_k": full("top_k", 0, torch.int32),
                        "top_p": full("top_p", 1.0, torch.float32),
                        "min_p": full("min_p", 0.0, torch.float32),
                        "seeds": torch.arange(rows, device=self.device),
                        "positions": full("positions", 3, torch.int64),
                    }

                yield Case(
                    "sample", f"R={rows}, {name}", arguments, 4 * rows * LARGE.vocab, exact=True
                )

    def penalties(self, rows: int) -> Case:
        def arguments() -> dict[str, Any]:
            number = torch.arange(rows, device=self.device)
            strength = torch.full((rows,), 1.1, device=self.device)
            return {
                "logits": self.randn(rows, LARGE.vocab, dtype=torch.float32),
                "rows": number,
                "seen": torch.randint(3, (rows, LARGE.vocab), device=self.device).int(),
                "slots": number,
                "repetition": strength,
                "presence": strength,
                "frequency": strength,
            }

        return Case(
            "apply_penalties",
            f"R={rows}",
            arguments,
            3 * 4 * rows * LARGE.vocab,
            outputs=("logits",),
        )

    # ---- one line ------------------------------------------------------------------------

    def error(self, case: Case, function: Callable[..., Any], arguments: dict[str, Any]) -> str:
        """Relative distance from the reference; or the share of draws that differ."""
        cloned = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        found = function(**arguments)
        expected = all_ops()[case.op].implementations["reference"].function(**cloned)
        pairs = [(arguments[name], cloned[name]) for name in case.outputs]
        pairs += [(found, expected)] if expected is not None else []
        if case.exact:
            differing = sum(int((a != b).sum()) for a, b in pairs)
            return f"{differing} differ"
        distance = max(
            float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs
        )
        return f"{distance:.1e}" + ("" if distance < 1e-2 else " WRONG")

    def line(self, case: Case, copy: float, product: float) -> str:
        function = all_ops()[case.op].implementations["triton"].function
        copies = self.copies(case)
        error = self.error(case, function, copies[0]) if case.check else ""
        calls = [lambda a=a: function(**a) for a in copies]
        seconds = self.seconds(calls * max(1, 16 // len(calls)))
        if case.operations:
            rate, unit, share = case.operations / seconds / 1e12, "TFLOP/s", product / 1e12
        else:
            rate, unit, share = case.read_write / seconds / 1e9, "GB/s", copy / 1e9
        return (
            f"{case.op:19} {case.shape:36} {seconds * 1e6:9.1f} us {rate:8.1f} {unit:8}"
            f"{rate / share:5.0%}  error {error}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of op names")
    options = parser.parse_args()
    platform = platforms.resolve(options.device)
    platform.activate()
    torch.manual_seed(0)
    bench = Bench(platform)
    copy, product = bench.ceilings()
    table = OpTable(platform)
    print(f"{platform.device_name}: copy {copy / 1e9:.0f} GB/s, bf16 8192^3 {product / 1e12:.0f} "
          f"TFLOP/s")  # fmt: skip
    with torch.inference_mode(), table.activate():
        for case in bench.cases():
            if any(part in case.op for part in options.only):
                print(bench.line(case, copy, product), flush=True)
                platform.empty_cache()


if __name__ == "__main__":
    main()
