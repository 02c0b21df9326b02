"""What an engine does while its device and the compiler of kernels start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import make_llm

from reprise import kernels_beside
from reprise.errors import ModelError
from reprise.ops import OpTable
from reprise.ops.registry import Op, intercept
from reprise.runner import examples, model_runner
from reprise.runner.examples import Examples


@pytest.fixture
def order(platform, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a start until the first kernel is compiled."""
    seen: list[str] = []

    @contextlib.contextmanager
    def warming_up(self: Any, **_: Any) -> Iterator[None]:
        try:
            yield
        finally:
            seen.append("warm")

    build_model = model_runner.build_model

    def build(*args: Any, **kwargs: Any) -> Any:
        seen.append("model")
        return build_model(*args, **kwargs)

    monkeypatch.setattr(type(platform), "warming_up", warming_up)
    monkeypatch.setattr(model_runner, "build_model", build)

    @contextlib.contextmanager
    def compiling_kernels(self: Any) -> Iterator[int]:
        seen.append("kernels")
        yield 0
        seen.append("those of draws")

    capture = model_runner.ModelRunner._capture_graphs

    def captured(self: Any) -> None:
        capture(self)
        seen.append("graphs")

    def begin_for(options: Any) -> None:
        if options["model"] is not None:
            seen.append("beside")

    monkeypatch.setattr(type(platform), "has_triton", True)
    monkeypatch.setattr(kernels_beside, "begin_for", begin_for)
    monkeypatch.setattr(Examples, "compiling_kernels", compiling_kernels)
    monkeypatch.setattr(model_runner.ModelRunner, "_capture_graphs", captured)
    return seen


def test_the_model_is_made_meanwhile_and_kernels_are_compiled_behind(tiny, device, order) -> None:
    with make_llm(tiny("qwen3"), device):
        assert order == ["beside", "model", "warm", "kernels", "graphs", "those of draws"]


def test_who_fails_meanwhile_waits_for_it_too(tiny, device, order, monkeypatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        order.append("broken")
        raise ModelError("no such layer")

    monkeypatch.setattr(model_runner, "build_model", broken)
    with pytest.raises(ModelError, match="no such layer"):
        make_llm(tiny("qwen3"), device)
    assert order == ["beside", "broken", "warm"]


def test_a_start_that_fails_before_ends_what_compiles_beside(tiny, device, monkeypatch) -> None:
    """It would wait for jobs as long as the program lives, or five minutes."""
    ended: list[int] = []
    monkeypatch.setattr(kernels_beside, "end", lambda: ended.append(1))

    def broken(*args: Any, **kwargs: Any) -> Any:
        assert not ended
        raise ModelError("no such layer")

    monkeypatch.setattr(model_runner, "build_model", broken)
    with pytest.raises(ModelError, match="no such layer"):
        make_llm(tiny("qwen3"), device)
    assert ended == [1]


def test_kernels_of_draws_alone_may_be_ready_later(tiny, device, monkeypatch) -> None:
    """One takes longest of all, and what a start does behind the others draws nothing."""
    called: dict[str, set[str]] = {}

    @contextlib.contextmanager
    def compiling_ahead(table: OpTable, passes: Any, later: Any, *_: int) -> Iterator[int]:
        for name, some in (("passes", passes), ("later", later)):
            seen = called[name] = set()

            def note(op: Op, function: Any, args: Any, kwargs: Any, seen: Any = seen) -> Any:
                seen.add(op.name)
                return op.fake(*args, **kwargs)

            with table.computing(), intercept(note):
                for each in some:
                    each()
        since.clear()
        yield 0
        called["since"] = since.copy()

    since: set[str] = set()
    monkeypatch.setattr(examples, "compiling_ahead", compiling_ahead)
    run = Op.__call__

    def computed(self: Op, *args: Any, **kwargs: Any) -> Any:
        since.add(self.name)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", computed)
    graphs = {"graph_mode": "full", "graph_buckets": "2", "graph_verify": "startup"}
    with make_llm(tiny("qwen3"), device, **graphs):
        pass
    assert "sample" in called["later"]
    assert "paged_attention" in called["passes"]
    assert "paged_attention" in called["since"]
    assert not called["since"] & (called["later"] - called["passes"])
