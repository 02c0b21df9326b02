"""Times DeepSeek-V4's layers, one of each kind, at the released Flash's widths.

    python benchmarks/deepseek_v4_layers.py
    python benchmarks/deepseek_v4_layers.py --requests 64 --contexts 4096 --kernels 12
    python benchmarks/deepseek_v4_layers.py --prompt 8192

One layer with a window alone, one with rows of 4 tokens and an indexer, one with rows of 128;
random weights in the released formats. Steps are decodes of requests of one length; caches have
random content, so that no two rows are as good to the indexer. A time is that of replays of a
device graph that holds the layer's part several times. *Bytes* are the weights that the part reads
(of experts those that so many rows hit if each is as likely) and the cache rows that the step sees,
over the rate at which a copy or a sum moved bytes in the same run; *ratio* is the time over that.
``--kernels`` lists so many of the kernels that took longest, in a trace of a layer.
``--prompt`` times for so many tokens what lies around a layer's products and moves bytes alone, the
rotation back with quantisation among it, which is the first kernel of an op: kernels beside the
operations of torch that they replace, as the share of what a copy moves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reprise import LLM, platforms
from reprise.bench.floor import measure_floor, size
from reprise.bench.presets import CONFIGS
from reprise.cache import Batch
from reprise.cache.batch import Table
from reprise.layers import Streams
from reprise.layers.lazy import tensor
from reprise.ops import OpTable, all_ops
from reprise.ops.fp8_linear.reference import quantise
from reprise.platforms import Platform
from reprise.runner import ModelRunner

KINDS = {"window": 0, "CSA": 4, "HCA": 128}
HEADS, HEAD, ROTATED, GROUPS, EXPERT = 64, 512, 64, 8, 2048
"""Flash's: heads, their size, what of it rotates, groups of output; width of an expert."""
GROUP = 128
"""Channels that share a scale."""
TIMES = 4
"""Parts in a graph."""


def config(directory: Path, experts: int) -> Path:
    """Flash's, of three layers."""
    values = json.loads((CONFIGS / "deepseek-v4-flash" / "config.json").read_text())
    values |= {
        "num_hidden_layers": len(KINDS),
        "compress_ratios": [*KINDS.values(), 0],
        "num_hash_layers": 1,
        "n_routed_experts": experts,
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory


class Steps:
    """Decodes of so many requests of one length, on a runner's caches."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.device = runner, runner.platform.device
        for cache in runner.model.caches().values():
            for name, each in cache.tensors.items():
                if "scales" in name:
                    each.fill_(2.0**-6)
                elif each.element_size() == 1:
                    each.view(torch.uint8).random_(0, 120)
                else:
                    each.normal_()

    def batch(self, requests: int, length: int) -> Batch:
        device = self.device
        lengths = torch.full((requests,), length, dtype=torch.int32, device=device)
        ids = torch.randint(0, self.runner.model.vocab_size, (requests,), device=device)
        ones = torch.ones_like(lengths)
        return Batch(
            token_ids=ids,
            positions=lengths.long() - 1,
            rows=torch.arange(1, requests + 1, device=device),
            query_start_loc=torch.arange(requests + 1, dtype=torch.int32, device=device),
            seq_lens=lengths,
            accepted=ones,
            known=torch.zeros_like(lengths),
            fresh=torch.zeros(requests, dtype=torch.bool, device=device),
            tables=tuple(self._tables(requests, length)),
            query_len=1,
        )

    def _tables(self, requests: int, length: int) -> Iterator[Table]:
        """Blocks of one pool, each of one table; again from the first one where they end."""
        layout, used = self.runner.cache_layout, [0] * len(self.runner.cache_layout.pools)
        for table in layout.tables:
            count = layout.pools[table.pool].num_blocks - 1
            needed = table.lifetime.needed(length - 1, length, table.block_size)
            width = table.entries(self.runner.max_model_len)
            blocks = torch.zeros(requests, width, dtype=torch.int32, device=self.device)
            order = torch.arange(requests * len(needed), device=self.device) + used[table.pool]
            # Far from each other: the step is odd, counts are made even.
            order = order * 7919 % (count - 1 + count % 2) + 1
            blocks[:, needed.start : needed.stop] = order.view(requests, -1)
            used[table.pool] += requests * len(needed)
            last = blocks[:, (length - 1) // table.block_size].long()
            yield Table(blocks, last * table.block_size + (length - 1) % table.block_size)


class Timer:
    def __init__(self, platform: Platform, ops: OpTable) -> None:
        self.platform, self.ops = platform, ops

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of a part."""

        def run() -> None:
            for _ in range(TIMES):
                call()

        with self.ops.activate():
            run()
            self.platform.synchronize()
            graph = self.platform.new_graph()
            graph.capture(run)
        times = []
        for _ in range(9):
            begin, end = (self.platform.event(timing=True) for _ in range(2))
            begin.record(self.platform.current_stream())
            graph.replay()
            end.record(self.platform.current_stream())
            self.platform.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / TIMES)
        return statistics.median(times[2:])

    def kernels(self, call: Callable[[], Any], count: int) -> list[str]:
        """Those that took longest, with what each took on average and how often it ran."""
        with self.ops.activate(), torch.profiler.profile() as profile:
            for _ in range(TIMES):
                call()
            self.platform.synchronize()
        found = [each for each in profile.key_averages() if each.self_device_time_total > 0]
        found.sort(key=lambda each: -each.self_device_time_total)
        return [
            f"    {each.self_device_time_total / TIMES:8.1f} us in {each.count / TIMES:4.1f} x "
            f"{each.key[:60]}"
            for each in found[:count]
        ]


def cache_bytes(layer: Any, requests: int, length: int) -> int:
    """Rows that a step sees, as stored; what it writes and a row's states are few."""
    attention = layer.attn
    window = attention.window
    total = min(attention.sizes.window, length) * _row(window, "kv")
    if attention.every:
        rows = length // attention.every
        if attention.indexer is not None:
            total += rows * _row(attention.kept, "keys")
            rows = min(rows, attention.sizes.index_top)
        total += rows * _row(attention.kept, "compressed")
    return requests * total


def _row(cache: Any, name: str) -> int:
    """Bytes of a row, with what lies beside it."""
    names = (name, f"{name}_tail", f"{name}_scales")
    found = [cache.tensors[each] for each in names if each in cache.tensors]
    return sum(each[0].numel() * each.element_size() // cache.tensors[name].shape[1]
               for each in found)  # fmt: skip


def expert_bytes(layer: Any, requests: int) -> float:
    """Of the experts that so many rows hit, and of what all rows read."""
    ffn, routing = layer.ffn, layer.ffn.routing
    hit = 1 - (1 - routing.top / routing.experts) ** requests
    experts = size(ffn.experts.parameters())
    return size(ffn.parameters()) - experts * (1 - hit)


def parts(layer: Any, steps: Steps, requests: int, length: int) -> Iterator[tuple[str, Any, float]]:
    """Name, call and bytes of each part of a layer."""
    hidden = steps.runner.model.hidden_size
    batch = steps.batch(requests, length)
    y = torch.randn(requests, hidden, device=steps.device, dtype=steps.runner.dtype)
    streams = Streams.begin(y, 4)
    site = size(layer.hc_attn.parameters()) + 2 * y.numel() * y.element_size() * 5
    attention = size(layer.attn.parameters()) + cache_bytes(layer, requests, length)
    experts = expert_bytes(layer, requests)

    def connection() -> Tensor:
        found: Tensor = layer.hc_attn(streams, y)
        return found

    yield "hc", connection, site
    yield "attention", lambda: tensor(layer.attn(y, batch)), attention
    yield "experts", lambda: tensor(layer.ffn(y, batch)), experts
    yield "layer", lambda: layer(streams, y, batch), 2 * site + attention + experts


def around_products(platform: Platform, tokens: int) -> Iterator[str]:
    """A line for each kernel around a prompt's products."""
    from reprise.ops.fp8_rotated_output.triton import quantised

    ops = all_ops()
    x = torch.randn(tokens, HEADS, HEAD, device=platform.device, dtype=torch.bfloat16)
    gate_up = 3 * torch.randn(tokens, 2 * EXPERT, device=platform.device, dtype=torch.bfloat16)
    positions = torch.arange(tokens, device=platform.device)
    angles = torch.randn(tokens, ROTATED, device=platform.device)
    back = {"x": x, "positions": positions, "cos_sin": angles, "norm_eps": 0.0, "inverse": True}
    clamp = {"x": gate_up, "limit": 10.0}
    table = OpTable(platform)
    timer = Timer(platform, table)
    native = platform.multiplies_fp8

    def both() -> Any:
        rotated = ops["rotary_tail"].implementations["reference"].function(**back)
        return quantise(rotated.view(tokens, -1), GROUP)

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        name: (partial(op.implementations["triton"].function, **arguments),
               partial(op.implementations["reference"].function, **arguments))
        for name, op, arguments in (("clamp", ops["swiglu_clamp"], clamp),
                                    ("rotation back", ops["rotary_tail"], back))
    }  # fmt: skip
    calls["rotation back and quantisation"] = (
        lambda: quantised(x, positions, angles, GROUPS, GROUP, native), both
    )  # fmt: skip
    rate = measure_floor(platform, torch.bfloat16, 1 << 30).copy_bytes_per_second
    for name, (kernel, replaced) in calls.items():
        given = gate_up if name == "clamp" else x
        with table.activate():
            found = kernel()
        found = found if isinstance(found, tuple) else (found,)
        moved = given.nbytes + sum(each.nbytes for each in found)
        took, before = timer.seconds(kernel), timer.seconds(replaced)
        yield (
            f"{name:30} {tokens} tokens {took * 1e6:9.1f} us {moved / took / rate:5.0%} of a copy; "
            f"by torch {before * 1e6:9.1f} us, {before / took:.1f} times as long"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[4096, 131072])
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--cache", type=int, default=6144, help="MiB")
    parser.add_argument("--experts", type=int, default=256, help="fewer fit a small device")
    parser.add_argument("--kernels", type=int, default=0)
    parser.add_argument("--op", nargs="*", default=[], help="NAME=IMPLEMENTATION")
    parser.add_argument("--prompt", type=int, help="tokens: only what lies around products")
    options = parser.parse_args()
    if options.prompt:
        platform = platforms.resolve(options.device)
        platform.activate()
        reason = all_ops()["swiglu_clamp"].implementations["triton"].unusable(platform)
        if reason is not None:
            parser.error(f"--prompt times kernels of Triton, which do not run here: {reason}")
        with torch.inference_mode():
            for line in around_products(platform, options.prompt):
                print(line, flush=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        engine = LLM(
            str(config(Path(directory), options.experts)),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            device=options.device,
            graph_mode="none",
            max_num_seqs=max(options.requests),
            max_model_len=max(options.contexts),
            max_num_batched_tokens=1024,
            kv_cache_dtype=options.kv_cache_dtype,
            kv_cache_memory_bytes=options.cache << 20,
            ops=dict(each.split("=") for each in options.op),
        ).engine
    runner = engine.runner
    rate = measure_floor(runner.platform, runner.dtype, 1 << 30).bytes_per_second
    print(f"{runner.platform.device_name}: {rate / 1e12:.2f} TB/s", flush=True)
    timer = Timer(runner.platform, runner.ops)
    layers = dict(zip(KINDS, runner.model.model.layers, strict=True))
    with torch.inference_mode():
        steps = Steps(runner)
        for length in options.contexts:
            for requests in options.requests:
                for kind, layer in layers.items():
                    for name, call, count in parts(layer, steps, requests, length):
                        if kind != "window" and name == "hc":
                            continue
                        took, least = timer.seconds(call), count / rate
                        print(
                            f"{kind:6} {requests:3} x {length:6} {name:9} {took * 1e6:9.1f} us "
                            f"bytes {least * 1e6:9.1f} us ratio {took / least:6.2f}",
                            flush=True,
                        )
                    if options.kernels:
                        print("\n".join(timer.kernels(call, options.kernels)), flush=True)


if __name__ == "__main__":
    main()
