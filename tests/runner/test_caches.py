"""Whatever a step writes and leaves behind is in the list of memory that comparisons look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import TinyModels, generate, greedy, make_llm, random_ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reprise import LLM
from reprise.layers import SelfAttention
from reprise.ops.registry import Op, intercept
from reprise.shape import StepShape

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that comes into being."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {place(each) for each in args if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and place(each) not in known:
                self.kept.append(each)  # lest another tensor get its place
        return result


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def steps_watched(llm: LLM) -> Iterator[set[str]]:
    """Names of arguments that ops write in the forward passes of this block, into memory that was
    there before the pass and that is neither listed nor an output."""
    forward_pass = llm.engine.runner.forward_pass
    forward, found = forward_pass.forward, set[str]()

    def watched(shape: StepShape, *rest: Any) -> Tensor:
        with Made() as made:

            def note(op: Op, function: Any, args: Any, kwargs: Any) -> Any:
                listed = [each.tensor for each in forward_pass.memory().values()]
                listed += [*forward_pass.outputs(shape).values(), *made.kept]
                places = {place(each) for each in listed}
                names = [each.name for each in op.overload._schema.arguments]
                named = dict(zip(names, args, strict=False), **kwargs)
                for name in op.mutates:
                    written = named.get(name)
                    if written is not None and place(written) not in places:
                        found.add(f"{op.name}: {name}")
                return function(*args, **kwargs)

            with intercept(note):
                return forward(shape, *rest)

    forward_pass.forward = watched
    try:
        yield found
    finally:
        forward_pass.forward = forward


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cache_that_is_written_is_listed(
    tiny: TinyModels, device: str, architecture: str
) -> None:
    llm = make_llm(tiny(architecture), device)
    with steps_watched(llm) as unlisted:
        generate(llm, [random_ids(1, 20), random_ids(2, 3)], greedy(3))
    assert not unlisted


def test_a_cache_that_is_not_declared_is_found(
    tiny: TinyModels, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that keeps its cache where nobody looks for it."""
    llm = make_llm(tiny("llama"), device)
    runner: Any = llm.engine.runner
    for each in runner.model.modules():
        if isinstance(each, SelfAttention):
            each.hidden = [vars(each).pop("cache")]
    monkeypatch.setattr(
        SelfAttention, "cache", property(lambda self: self.hidden[0]), raising=False
    )
    runner.forward_pass._caches = runner.model.caches()
    with steps_watched(llm) as unlisted:
        generate(llm, [random_ids(1, 20)], greedy(3))
    assert unlisted == {"rotary_cache: key_cache", "rotary_cache: value_cache"}
