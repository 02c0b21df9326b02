"""Device graphs: captured once, replayed on fixed addresses, from inputs as they are then."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reprise.doctor.conformance.contract import Broken, Kit, Skipped, contract, need
from reprise.errors import GraphError
from reprise.graphs.compare import poison_memory
from reprise.platforms.device_graph import DeviceGraph


def captured(kit: Kit, function: Callable[[], Any], pool: Any = None) -> tuple[DeviceGraph, Any]:
    """A graph of ``function``, which runs once before, and what it returned under capture."""
    kit.need_graphs()
    with torch.inference_mode():
        with kit.platform.capture_stream():
            function()
        graph = kit.platform.new_graph(pool)
        return graph, graph.capture(function)


def replayed(kit: Kit, graph: DeviceGraph, result: Tensor) -> list[float]:
    graph.replay()
    kit.platform.synchronize()
    return [float(each) for each in (result.amin(), result.amax())]


@contract("graphs")
def graphs_replay_fresh_inputs(kit: Kit) -> str:
    """A replay computes from what its inputs hold then, not from what they held at capture.

    Inputs are refilled in place; outputs appear at the addresses that capture gave them.
    """
    x, out = kit.full(1024, value=1.0), kit.full(1024)
    graph, _ = captured(kit, lambda: out.copy_(x * 2 + 1))
    for value in (3.0, -5.0, 3.0):
        x.fill_(value)
        out.fill_(float("nan"))
        got = replayed(kit, graph, out)
        need(
            got == [2 * value + 1] * 2,
            f"input {value} gives {got[0]} and not {2 * value + 1}: the replay used stale inputs",
        )
    return "3 inputs"


@contract("graphs")
def graphs_run_no_python(kit: Kit) -> str:
    """Python runs at capture and never at replay; host numbers keep the value they had.

    This is why verification exists: what Python decided at capture stays decided.
    """
    x, out, calls = kit.full(64, value=1.0), kit.full(64), []

    def step() -> None:
        calls.append(1)
        out.copy_(x * len(calls))

    graph, _ = captured(kit, step)
    count = len(calls)
    for _ in range(3):
        got = replayed(kit, graph, out)
        need(got == [float(count)] * 2, f"a host number of {count} at capture was {got[0]} later")
    need(len(calls) == count, f"Python ran {len(calls) - count} times during 3 replays")
    return "3 replays"


@contract("graphs")
def graphs_share_a_pool(kit: Kit) -> str:
    """Graphs of one pool take each other's scratch memory and stay right in any order.

    A second capture of the same work makes the pool grow by less than the first did.
    """
    kit.need_graphs()
    side = 1024
    pool = kit.platform.graph_pool()
    xs = [kit.full(side, side, value=1.0) for _ in range(2)]
    outs = [kit.full(side, side) for _ in range(2)]
    graphs = []
    for number in range(2):

        def step(number: int = number) -> None:
            y = xs[number] + 1
            z = y * y
            outs[number].copy_(z - y)

        graphs.append(captured(kit, step, pool)[0])
    for order in ((0, 1), (1, 0), (1, 1)):
        for number in order:
            value = 2.0 + number
            xs[number].fill_(value)
            expected = (value + 1) * value
            got = replayed(kit, graphs[number], outs[number])
            need(got == [expected] * 2, f"graph {number} gives {got[0]} and not {expected}")
    first, second = (each.nbytes for each in graphs)
    need(
        first == 0 or second < first,
        f"the pool grew by {first} bytes for the first graph and by {second} for its equal",
    )
    return f"grew by {first} bytes, then by {second}"


@contract("graphs")
def graphs_scratch_is_scratch(kit: Kit) -> str:
    """Between replays no graph needs what its pool holds.

    Verification overwrites the pool with NaN, so a graph that reads scratch it has not written
    in the same replay shows.
    """
    x, out = kit.full(1 << 16, value=1.0), kit.full(1 << 16)
    graph, _ = captured(kit, lambda: out.copy_((x + 1) * (x + 2)))
    memory = kit.platform.graph_pool_memory(graph.pool)
    if not memory:
        raise Skipped("the platform does not show its pools' memory; verification is weaker")
    poison_memory(memory)
    x.fill_(2.0)
    got = replayed(kit, graph, out)
    need(got == [12.0] * 2, f"with its pool overwritten a graph gives {got[0]} and not 12")
    return f"{sum(each.numel() for each in memory)} bytes overwritten"


@contract("graphs")
def graphs_refuse_host_reads(kit: Kit) -> str:
    """Reading a device value on the host during capture is an error, never a stale number.

    After the refusal the device works and the next capture succeeds.
    """
    reads: dict[str, Callable[[Tensor], Any]] = {
        "item()": lambda x: x.sum().item(),
        "tolist()": lambda x: x.tolist(),
        "nonzero()": lambda x: x.nonzero(),
        "a branch": lambda x: bool(x[0] > 0),
    }
    for name, read in reads.items():
        x = kit.full(16, value=1.0)

        def step(read: Callable[[Tensor], Any] = read, x: Tensor = x) -> None:
            x.add_(1)
            read(x)

        try:
            captured(kit, step)
        except (GraphError, RuntimeError):
            pass
        else:
            raise Broken(f"{name} on a device tensor was captured without an error")
        out = kit.full(16)
        graph, _ = captured(kit, functools.partial(out.add_, 1))
        got = replayed(kit, graph, out.zero_())
        need(got == [1.0] * 2, f"after {name} was refused, the next graph gives {got[0]} and not 1")
    return ", ".join(reads)


@contract("graphs")
def graphs_keep_their_allocations(kit: Kit) -> str:
    """What is allocated during capture has a fixed address and belongs to the graph.

    A tensor that capture returned is refilled by each replay, at the same address, whatever is
    allocated in the meantime and whatever other graphs of the pool do.
    """
    kit.need_graphs()
    pool = kit.platform.graph_pool()
    x = kit.full(1 << 14, value=1.0)
    graph, result = captured(kit, lambda: x * 3, pool)
    address = result.data_ptr()
    # Of the pool's next capture the result is none of the scratch.
    other, kept = captured(kit, lambda: x * 5, pool)
    others = [torch.full_like(x, -1.0) for _ in range(8)]
    for value in (2.0, 7.0):
        x.fill_(value)
        other.replay()
        got = replayed(kit, graph, result)
        need(got == [3 * value] * 2, f"a result of capture holds {got[0]} and not {3 * value}")
        got = replayed(kit, other, kept)
        need(got == [5 * value] * 2, f"another graph's result is {got[0]} and not {5 * value}")
    need(result.data_ptr() == address, "the result of a capture moved")
    need(all(bool(each.eq(-1).all()) for each in others), "a replay wrote into other tensors")
    return "2 graphs, 2 replays"


@contract("graphs")
def graphs_alternate_with_eager_work(kit: Kit) -> str:
    """Segments of one step, with eager work between them, see each other's results in order.

    This is how the piecewise executors run break ops.
    """
    kit.need_graphs()
    platform = kit.platform
    pool = platform.graph_pool()
    x, middle, out = kit.full(256, 256, value=1.0), kit.full(256, 256), kit.full(256, 256)
    first, second = platform.new_graph(pool), platform.new_graph(pool)
    with torch.inference_mode(), platform.capture_stream():
        first.begin()
        half = x + 1
        first.end()
        middle.copy_(half * 2)
        second.begin()
        out.copy_(middle + half)
        second.end()
        for value in (1.0, 4.0):
            x.fill_(value)
            first.replay()
            middle.copy_(half * 2)
            second.replay()
            platform.synchronize()
            got = float(out[0, 0])
            need(got == 3 * (value + 1), f"segments give {got} and not {3 * (value + 1)}")
    return "2 segments, 1 break"
