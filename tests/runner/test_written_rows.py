"""What a step writes in the caches: how much that is."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from helpers import TinyModels, generate, greedy, make_llm, random_ids
from recurrent import hybrids

from reprise.cache.memory import allocate_caches
from reprise.platforms import Platform
from reprise.shape import StepShape

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "drafts": (4, {"speculative_config": NGRAM}),
    "codes": (1, {"kv_cache_dtype": "fp8"}),
    "states": (1, {}),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_its_bytes_are_those_of_its_copies(
    tiny: TinyModels, device: str, platform: Platform, kind: str
) -> None:
    """So much is kept free for each copy that a comparison makes."""
    if kind == "codes" and platform.fp8_dtype is None:
        pytest.skip("the device has no eight-bit floating-point numbers")
    width, options = OPTIONS[kind]
    with hybrids() if kind == "states" else contextlib.nullcontext():
        llm = make_llm(tiny("qwen3"), device, graph_mode="none", **options)
    runner = llm.engine.runner
    for shape in (StepShape.decode(3, width), StepShape.mixed(40, 3), StepShape.mixed(1, 1)):
        state = runner.forward_pass.state(shape)
        assert state.nbytes == sum(each.nbytes for each in state.read().values()) > 0


def test_the_places_are_those_of_the_step_that_was_read(
    tiny: TinyModels, device: str, platform: Platform
) -> None:
    """A replay may change the inputs that say where: what was read is put back all the same."""
    with hybrids():
        llm = make_llm(tiny("qwen3"), device, graph_mode="none")
    runner = llm.engine.runner
    shape = StepShape.decode(3)
    with torch.inference_mode():
        runner.forward_pass.probes(shape, True)[0].fill()
        state = runner.forward_pass.state(shape)
        rows = state.read()
        runner.buffers.slots.zero_()
        runner.buffers.block_tables.zero_()
        spoilt = {name: torch.full_like(each, 2) for name, each in rows.items()}
        state.write(spoilt)
        elsewhere = runner.forward_pass.state(shape).read()
        again = state.read()
    assert rows.keys() == again.keys() == elsewhere.keys() != set()
    assert all(torch.equal(again[name], each) for name, each in spoilt.items())
    assert not any((each == 2).all() for each in elsewhere.values())


def test_the_list_of_memory_has_the_caches_as_they_are(tiny: TinyModels, device: str) -> None:
    """A canary looks at the blocks that the list says are used, in the tensors that it names."""
    llm = make_llm(tiny("qwen3"), device, graph_mode="none")
    runner = llm.engine.runner

    def caches() -> dict[str, Any]:
        regions = runner.forward_pass.memory()
        return {name: each for name, each in regions.items() if each.owner == "cache"}

    before = caches()
    generate(llm, [random_ids(1, 70)], greedy(4))
    after = caches()
    assert before.keys() == after.keys() != set()
    assert all(each.used > before[name].used for name, each in after.items())
    allocate_caches(runner.caches, runner.cache_layout, runner.platform)
    places = {each.tensor.data_ptr() for each in caches().values()}
    assert places == {
        each.data_ptr() for cache in runner.caches.values() for each in cache.tensors.values()
    }
