"""Which part of the model each op call belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from reprise.doctor.graphs.report import Where
from reprise.graphs.locate import Location
from reprise.ops.registry import Op, intercept

_CALL = re.compile(r"\b(\w+) #(\d+)")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


class Places:
    """Names for op calls, learned from one eager forward pass.

    A call belongs to the module that owns the parameters and caches among its arguments; where
    it has none, to the innermost module that runs.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        self.modules: dict[str, str] = {}
        """``op #index`` to the qualified name of a module."""
        self.ops: dict[str, Op] = {}
        """The ops that the pass calls, by name."""
        owners = _owners(model)
        counts: Counter[str] = Counter()
        with _running(model) as running:

            def note(
                op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> Any:
                found = [
                    owners[each.data_ptr()]
                    for each in (*args, *kwargs.values())
                    if isinstance(each, Tensor) and each.data_ptr() in owners
                ]
                self.modules[f"{op.name} #{counts[op.name]}"] = _common(found) or running[-1]
                self.ops[op.name] = op
                counts[op.name] += 1
                return function(*args, **kwargs)

            with intercept(note):
                forward()

    def module(self, call: str) -> str:
        return self.modules.get(call, "")

    def where(self, location: Location) -> Where:
        """The place that :func:`reprise.graphs.locate.locate` found."""
        found = self._place(location.op)
        assert found is not None, f"{location.op!r} is an op and its number"
        found.tensor, found.segment = location.tensor, location.segment
        found.produced, found.after = location.produced, location.after
        return found

    def in_text(self, text: str) -> Where | None:
        """The place that an error message names, if it does."""
        return self._place(text)

    def _place(self, text: str) -> Where | None:
        match = _CALL.search(text)
        if match is None:
            return None
        module = self.module(match.group())
        return Where(match[1], int(match[2]), module, layer_number(module))


def layer_number(module: str) -> int | None:
    """``3`` of ``model.layers.3.self_attn``."""
    match = _NUMBER.search(module)
    return None if match is None else int(match[1])


def _owners(model: nn.Module) -> Mapping[int, str]:
    """Address of every parameter, and of every other tensor that exactly one module owns, to the
    module's name."""
    parameters: dict[int, str] = {}
    tables: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor in module.parameters(recurse=False):
            # A tied head and the embedding share one; the shorter name says more.
            known = parameters.get(tensor.data_ptr(), name)
            parameters[tensor.data_ptr()] = min(known, name, key=len)
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor) and tensor.numel():
                tables.setdefault(tensor.data_ptr(), []).append(name)
    alone = {address: names[0] for address, names in tables.items() if len(names) == 1}
    return {**alone, **parameters}


def _common(names: list[str]) -> str:
    """The innermost module that contains all of them."""
    if not names:
        return ""
    split = [each.split(".") for each in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose ``forward`` is running, innermost last."""
    stack = [""]
    hooks = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append(name)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            stack.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()
