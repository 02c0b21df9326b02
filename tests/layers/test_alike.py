"""Of layers that make the same calls a rehearsal runs few, and misses no call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import TinyModels, make_llm
from hypothesis import given
from recurrent import hybrids
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reprise.distributed import ALONE, Group
from reprise.graphs.padding import compute_padding
from reprise.layers.alike import Alike, chosen
from reprise.ops.registry import intercept
from reprise.ops.rehearsal import rehearsal
from reprise.platforms import Platform
from reprise.shape import StepShape

LAYERS = 9


@given(st.lists(st.integers(0, 3), max_size=12))
def test_every_layer_comes_behind_all_that_it_comes_behind(kinds: list[int]) -> None:
    places = chosen(kinds)
    assert places == sorted(set(places))
    run = [kinds[place] for place in places]
    neighbours = set(pairwise(kinds))
    assert neighbours <= set(pairwise(run))
    assert run[:1] == kinds[:1]
    assert run[-1:] == kinds[-1:]
    assert len(places) <= 2 * len(neighbours) + 2


def key_of(value: Any) -> Any:
    """What a kernel may be compiled for."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
    return value


def calls_of(llm: Any, shape: StepShape, rehearsed: bool) -> list[Any]:
    forward_pass = llm.engine.runner.forward_pass
    calls: list[Any] = []

    def note(op: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        calls.append((op.name, *map(key_of, args), *sorted(kwargs.items())))
        return function(*args, **kwargs)

    kept = rehearsal() if rehearsed else contextlib.nullcontext()
    with forward_pass.ops.computing(), intercept(note), kept:
        compute_padding(forward_pass, shape)
    return calls


def test_where_caches_lie_is_asked_beside_who_looks_at_torch(tiny: TinyModels, device: str) -> None:
    """While kernels are compiled ahead somebody does, and layers have hundreds of such numbers."""
    looked: list[Any] = []

    class Looks(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            looked.append(func)
            return func(*args, **(kwargs or {}))

    with make_llm(tiny("qwen3"), device, graph_mode="none") as llm:
        layers = Alike(llm.engine.runner.model.model.layers)
        places = layers.some()
        with Looks():
            assert layers.some() == places
        assert not looked


@pytest.mark.parametrize(
    "kind", ["qwen3", "llama", "mistral", "qwen3_moe", "hybrid", "windows", "codes"]
)
def test_a_rehearsal_makes_every_kind_of_call(
    tiny: TinyModels, device: str, platform: Platform, kind: str
) -> None:
    options: dict[str, Any] = {}
    config: dict[str, Any] = {"num_hidden_layers": LAYERS}
    if kind == "codes":
        if platform.fp8_dtype is None:
            pytest.skip("the device has no eight-bit floating-point numbers")
        options["kv_cache_dtype"] = "fp8"
    if kind == "windows":
        config |= {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 5}
    name = {"codes": "qwen3", "windows": "qwen3", "hybrid": "qwen3"}.get(kind, kind)
    with hybrids() if kind == "hybrid" else contextlib.nullcontext():
        llm = make_llm(tiny(name, **config), device, graph_mode="none", **options)
        for shape in (StepShape.decode(1), StepShape.decode(4), StepShape.mixed(24, 3)):
            whole, some = calls_of(llm, shape, False), calls_of(llm, shape, True)
            assert set(some) == set(whole)
            assert len(some) < len(whole) / (1.2 if kind in ("windows", "hybrid") else 3)


class Listed(list[int]):
    """A list that says more than it holds."""

    def __init__(self, mode: int) -> None:
        super().__init__([1, 2])
        self.mode = mode


@dataclass
class Fields:
    width: int


class Slotted(Fields):
    __slots__ = ("mode",)

    def __init__(self, mode: int) -> None:
        super().__init__(1)
        self.mode = mode


class Wrapped(Tensor):
    """Its operations may be anything."""


class Layer(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        vars(self).update(attributes)


@pytest.mark.parametrize(
    "make",
    [
        lambda number: {"window": number == 4},
        lambda number: {"format": "fp4" if number == 4 else "fp8"},
        lambda number: {"names": [f"layers.{number}", "gelu" if number == 4 else "silu"]},
        lambda number: {"helper": object() if number == 4 else ALONE},
        lambda number: {"table": torch.zeros(3 if number == 4 else 2)},
        lambda number: {"part": torch.zeros(64)[number == 4 :][:8]},
        lambda number: {"bits": "4" if number == 4 else "8"},
        lambda number: {"scale": "0.5" if number == 4 else "0.7"},
        lambda number: {"table": torch.zeros(2, device="meta" if number == 4 else None)},
        lambda number: {"table": torch.zeros(2, dtype=torch.int32 if number == 4 else None)},
        lambda number: {"table": torch.eye(2).to_sparse() if number == 4 else torch.eye(2)},
        lambda number: {"table": torch.eye(2).as_subclass(Wrapped if number == 4 else Tensor)},
        lambda number: {"limit": torch.tensor(number == 4)},
        lambda number: {"modes": Listed(1) if number == 4 else [1, 2]},
        lambda number: {"modes": Fields(2 if number == 4 else 1)},
    ],
)
def test_a_layer_that_is_otherwise_runs(make: Callable[[int], dict[str, Any]]) -> None:
    layers = [Layer(**make(number)) for number in range(LAYERS)]
    assert Alike(layers).some() == [0, 1, 3, 4, 5]
    assert Alike([Layer(path=f"layers.{number}") for number in range(LAYERS)]).some() == [0, 1]


@pytest.mark.parametrize("kind", [Listed, Slotted])
def test_what_is_not_all_seen_is_like_nothing_else(kind: Callable[[int], Any]) -> None:
    """A list may have attributes, a dataclass fields that its dictionary has not."""
    layers = [Layer(part=kind(number == 4)) for number in range(LAYERS)]
    assert Alike(layers).some() == list(range(LAYERS))


def test_hooks_and_weights_of_other_sizes_count() -> None:
    layers = [Layer() for _ in range(LAYERS)]
    alike = Alike(layers)
    assert alike.some() == [0, 1]
    hook = layers[4].register_forward_hook(lambda *given: None)
    assert alike.some() == [0, 1, 3, 4, 5]
    hook.remove()
    vars(layers[6])["forward"] = lambda *given: None
    assert alike.some() == [0, 1, 5, 6, 7]
    layers = [Layer() for _ in range(LAYERS)]
    layers[4].weight = nn.Parameter(torch.zeros(4, 5), requires_grad=False)
    assert Alike(layers).some() == [0, 1, 3, 4, 5]


def test_layers_that_wait_for_other_ranks_all_run() -> None:
    """The others may not have laid out their weights alike, and would wait for ever."""
    group = Group("two", 0, 2)
    assert Alike([Layer(group=group) for _ in range(3)]).some() == [0, 1, 2]


def test_it_takes_as_much_memory_at_a_time_as_a_whole_pass(
    tiny: TinyModels, device: str, platform: Platform
) -> None:
    """The cache gets what is left beside it."""
    if not platform.counts_memory:
        pytest.skip("nothing counts the device's memory")
    llm = make_llm(tiny("qwen3", num_hidden_layers=LAYERS), device, graph_mode="none")
    forward_pass = llm.engine.runner.forward_pass
    peaks = []
    for kept in (rehearsal(), contextlib.nullcontext(), rehearsal()):
        with forward_pass.ops.computing(), kept:
            platform.synchronize()
            platform.reset_peak_memory()
            before = platform.memory_allocated()
            compute_padding(forward_pass, StepShape.mixed(500, 3))
            peaks.append(platform.peak_memory_allocated() - before)
    assert peaks[1] == peaks[2] > 0
