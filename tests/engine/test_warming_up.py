"""What an engine does while its device and the compiler of kernels start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import make_llm

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
    monkeypatch.setattr(Examples, "compile_kernels", lambda self: seen.append("kernels"))
    return seen


def test_the_model_is_made_meanwhile_and_kernels_are_compiled_behind(tiny, device, order) -> None:
    with make_llm(tiny("qwen3"), device):
        assert order == ["model", "warm", "kernels"]


def test_who_fails_meanwhile_waits_for_it_too(tiny, device, order, monkeypatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        order.append("broken")
        raise ModelError("no such layer")

    monkeypatch.setattr(model_runner, "build_model", broken)
    with pytest.raises(ModelError, match="no such layer"):
        make_llm(tiny("qwen3"), device)
    assert order == ["broken", "warm"]


def test_what_draws_is_compiled_before_what_computes(tiny, device, monkeypatch) -> None:
    """It takes longest: begun last, all else would be done before it."""
    called: list[list[str]] = []

    def note(op: Op, function: Any, args: Any, kwargs: Any) -> Any:
        called[-1].append(op.name)
        return op.fake(*args, **kwargs)

    def compile_ahead(table: OpTable, passes: list[Any], *_: int) -> int:
        with table.computing(), intercept(note):
            for each in passes:
                called.append([])
                each()
        return 0

    monkeypatch.setattr(examples, "compile_ahead", compile_ahead)
    with make_llm(tiny("qwen3"), device):
        pass
    drawing = [n for n, names in enumerate(called) if "sample" in names]
    computing = [n for n, names in enumerate(called) if "paged_attention" in names]
    assert drawing
    assert computing
    assert max(drawing) < min(computing)
