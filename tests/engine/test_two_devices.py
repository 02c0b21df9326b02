"""Engines on a device that is not the first, and on two of them in one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import TinyModels, greedy, make_llm, random_ids, token_ids

from reprise import LLM, platforms

PROMPTS = [{"prompt_token_ids": random_ids(n, 3 + 7 * n)} for n in range(6)]
PARAMS = greedy(24, ignore_eos=True)


@pytest.fixture(scope="module")
def both(tiny: TinyModels, device: str) -> Iterator[list[LLM]]:
    """With graphs: the second device's alone, then the first one's beside it."""
    platform = platforms.resolve(device)
    if platform.is_the_host or platform.device_count() < 2:
        pytest.skip("two devices of a kind are needed")
    name = device.partition(":")[0]
    memory = torch.get_device_module(name).memory_allocated
    before = memory(0)
    second = make_llm(tiny("qwen3"), f"{name}:1", graph_mode="full")
    assert memory(0) == before, "an engine on the second device has memory of the first"
    assert str(second.engine.platform.device) == f"{name}:1"
    first = make_llm(tiny("qwen3"), f"{name}:0", graph_mode="full")
    yield [first, second]
    for each in (first, second):
        each.engine.close()


def of_all(llm: LLM) -> list[list[int]]:
    return token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))


def test_each_has_the_same_tokens_one_after_the_other(both: list[LLM]) -> None:
    expected = of_all(both[0])
    for _ in range(3):
        for each in both:
            assert of_all(each) == expected
    for each in both:
        report = each.graph_report()
        assert sum(graph.replays for graph in report.graphs) > 0
        assert not report.quarantined


def test_and_step_by_step(both: list[LLM]) -> None:
    """Who steps engines of several devices in one thread says whose turn it is."""
    expected = of_all(both[0])
    engines = [each.engine for each in both]
    groups = [
        [engine.add(f"{n}", prompt, PARAMS) for n, prompt in enumerate(PROMPTS)]
        for engine in engines
    ]
    while any(engine.has_work for engine in engines):
        for engine in engines:
            if engine.has_work:
                engine.platform.activate()
                engine.step()
    for found in groups:
        assert [list(each.output().outputs[0].token_ids) for each in found] == expected


def test_and_in_two_threads(both: list[LLM]) -> None:
    expected = of_all(both[0])
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda llm: [of_all(llm) for _ in range(3)], both):
            assert found == [expected] * 3
