"""A device whose memory calls fail from some call on: bookkeeping is lost, not the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import TinyModels, generate, greedy, make_llm, random_ids

from reprise.errors import CapacityError, PlatformError
from reprise.platforms import Platform

MEMORY_CALLS = (
    "memory_info", "memory_allocated", "peak_memory_allocated", "memory_reserved",
    "reset_peak_memory", "empty_cache",
)  # fmt: skip
SMALL: dict[str, Any] = {
    "graph_mode": "full", "graph_buckets": "decode=2;mixed=8", "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
}  # fmt: skip


@pytest.fixture
def lose_memory(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call with a number: so many memory calls work. Returns a function that counts all of them."""

    def after(calls: int) -> Callable[[], int]:
        seen = [0]

        def failing(kept: Any) -> Any:
            def call(self: Platform) -> Any:
                seen[0] += 1
                if seen[0] > calls:
                    raise OSError("the driver is gone")
                return kept(self)

            return call

        kind = type(platform)
        monkeypatch.setattr(kind, "graph_memory", "measure")
        monkeypatch.setattr(kind, "counts_memory", True)
        for name in MEMORY_CALLS:
            monkeypatch.setattr(kind, name, failing(getattr(kind, name)))
        return lambda: seen[0]

    yield after
    monkeypatch.undo()


@pytest.mark.parametrize("calls", [0, 1, 3, 4, 5, 6, 8, 11, 14])
def test_an_engine_that_knows_its_cache_starts(
    tiny: TinyModels, device: str, lose_memory: Any, calls: int
) -> None:
    model, prompt = tiny("qwen3"), random_ids(3, 20)
    count = lose_memory(calls)
    llm = make_llm(model, device, **SMALL)
    assert count() > calls, "some calls failed"
    assert all(each.verified for each in llm.graph_report().graphs)
    assert model.is_greedy(prompt, generate(llm, [prompt], greedy(8))[0])


def test_without_it_the_error_names_the_remedies(
    tiny: TinyModels, device: str, lose_memory: Any
) -> None:
    lose_memory(1)
    with pytest.raises(PlatformError, match="the driver is gone") as error:
        make_llm(tiny("qwen3"), device, num_blocks=None, **SMALL)
    for part in ("num_blocks", "kv_cache_memory_bytes", "--graph-memory-profile off"):
        assert part in str(error.value)
    with pytest.raises(PlatformError, match="num_blocks") as error:
        make_llm(tiny("qwen3"), device, num_blocks=None, **SMALL, graph_memory_profile="off")
    assert "--graph-memory-profile" not in str(error.value)


@pytest.mark.parametrize("told", [float("nan"), 1.5e9, None, "8 GiB"])
def test_what_is_no_number_of_bytes_is_not_taken_for_one(
    tiny: TinyModels, device: str, platform: Platform, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr(type(platform), "cache_budget", lambda *_: told)
    with pytest.raises(PlatformError, match=f"{told!r} bytes .*kv_cache_memory_bytes"):
        make_llm(tiny("qwen3"), device, num_blocks=None, **SMALL)


def test_a_device_that_is_lost_altogether(
    tiny: TinyModels, device: str, lose_memory: Any, platform: Platform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lose_memory(5)
    zeros, made = type(platform).zeros, []

    def once(self: Platform, *args: Any) -> Any:
        made.append(args)
        if len(made) > 1:
            raise RuntimeError("unspecified launch failure")
        return zeros(self, *args)

    monkeypatch.setattr(type(platform), "zeros", once)
    with pytest.raises(CapacityError, match="unspecified launch failure") as error:
        make_llm(tiny("qwen3"), device, **SMALL)
    assert "--graph-memory-profile off" in str(error.value)
