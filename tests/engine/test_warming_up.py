"""What an engine does while its device and the compiler of kernels start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_llm
from torch import Tensor

from reprise import kernels_beside
from reprise.errors import ModelError
from reprise.graphs import runner as graph_runner
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
    def compiling_kernels(self: Any) -> Iterator[Any]:
        seen.append("kernels")
        yield SimpleNamespace(ready=lambda: seen.append("those of one request"))
        seen.append("those of draws")

    capture = model_runner.ModelRunner._capture_graphs

    def captured(self: Any) -> None:
        seen.append("graphs")
        capture(self)

    def begin_for(options: Any, share: int) -> None:
        if options["model"] is not None and share == 1:
            seen.append("beside")

    monkeypatch.setattr(type(platform), "has_triton", True)
    monkeypatch.setattr(kernels_beside, "begin_for", begin_for)
    monkeypatch.setattr(Examples, "compiling_kernels", compiling_kernels)
    monkeypatch.setattr(model_runner.ModelRunner, "_capture_graphs", captured)
    return seen


def test_the_model_is_made_meanwhile_and_kernels_are_compiled_behind(tiny, device, order) -> None:
    later = ["those of one request", "graphs", "those of draws"]
    with make_llm(tiny("qwen3"), device):
        assert order == ["beside", "model", "warm", "kernels", *later]


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


def test_kernels_may_be_ready_later_that_nothing_before_needs(tiny, device, monkeypatch) -> None:
    """Those that take longest: of attention of one request before its graph is captured, and of
    draws behind all graphs."""
    groups: list[set[Any]] = []
    since: set[Any] = set()
    ready: list[set[Any]] = []

    def key(op: Op, args: Any) -> Any:
        return op.name, *((x.dtype, x.shape) for x in args[:1] if isinstance(x, Tensor))

    @contextlib.contextmanager
    def compiling_ahead(table: OpTable, passes: Any, later: Any, *_: int) -> Iterator[Any]:
        for some in (passes, *later):
            seen: set[Any] = set()
            groups.append(seen)

            def note(op: Op, function: Any, args: Any, kwargs: Any, seen: Any = seen) -> Any:
                if not any(key(op, args) in each for each in groups[:-1]):
                    seen.add(key(op, args))
                return op.fake(*args, **kwargs)

            with table.computing(), intercept(note):
                for each in some:
                    each()
        since.clear()
        yield SimpleNamespace(ready=lambda: [ready.append(since.copy()), since.clear()])
        ready.append(since.copy())

    monkeypatch.setattr(examples, "compiling_ahead", compiling_ahead)
    run = Op.__call__

    def computed(self: Op, *args: Any, **kwargs: Any) -> Any:
        since.add(key(self, args))
        return run(self, *args, **kwargs)

    uses_of_phase = graph_runner.uses_of_phase

    def computing_nothing(*args: Any) -> Any:
        before = since.copy()
        found = uses_of_phase(*args)
        since.intersection_update(before)
        return found

    monkeypatch.setattr(Op, "__call__", computed)
    monkeypatch.setattr(graph_runner, "uses_of_phase", computing_nothing)
    graphs = {"graph_mode": "full", "graph_buckets": "1,2,4,8,16", "graph_verify": "startup"}
    with make_llm(tiny("qwen3"), device, max_num_seqs=4, **graphs):
        pass
    _, one, draws = groups
    assert {"sample", "masked_argmax"} <= {name for name, *_ in draws}
    assert "paged_attention" in {name for name, *_ in one}
    profiled, captured = ready
    assert "paged_attention" in {name for name, *_ in captured & one}
    assert not profiled & (one | draws)
    assert not captured & draws
