"""A model compiled in pieces: the code between ops that write goes through the compiler.

A compiler makes a program free of side effects before it optimises. An op of ours that writes into
its arguments is opaque to it, so nothing could be gained there, and much is lost where it fails to
undo its own copies: key and value caches that share memory were copied whole at each step, and
came back wrong. Such ops, break ops among them, are therefore called as they are.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.fx.experimental._config as shape_config
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.passes.split_module import split_module

from reprise.ops.registry import find
from reprise.platforms.device_graph import launch

logger = logging.getLogger(__name__)
RECOMPILATIONS = 64
"""That a model may need: for one token, for one request, and the like."""
_numbers = itertools.count()


def keep_compiled_code() -> None:
    """Choose where compiled code is kept, so that a second start compiles nothing.

    A directory that cannot be written, the user's own choice too, is replaced by a temporary one:
    importing the compiler makes it, and transformers imports the compiler though nothing is to be
    compiled. Call it before.
    """
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    triton = os.environ.get("TRITON_HOME") or home
    _keep("TORCHINDUCTOR_CACHE_DIR", f"{base}/reprise/inductor", always=True)
    _keep("TRITON_CACHE_DIR", f"{triton}/.triton/cache", always=False)


def _keep(variable: str, default: str, *, always: bool) -> None:
    """Set the variable if its directory is to be replaced, or ``always``."""
    wanted = os.environ.get(variable) or default
    reason = _unwritable(Path(wanted))
    if reason is not None:
        used = tempfile.mkdtemp(prefix="reprise-")
        atexit.register(_remove, used, os.getpid())
        logger.warning(
            "compiled code is kept in %s until the process ends, not in %s: %s (%s chooses)",
            used,
            wanted,
            reason,
            variable,
        )
        os.environ[variable] = used
    elif always:
        os.environ[variable] = wanted


def _unwritable(directory: Path) -> str | None:
    """Why no file can be made in the directory, which need not exist yet; None: one can."""
    nearest = directory.absolute()
    try:
        while not nearest.exists():
            nearest = nearest.parent
    except OSError as error:
        return f"{nearest}: {error.strerror}"
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written"


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a child of a fork
        shutil.rmtree(directory, ignore_errors=True)


def compile_model(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` with all that lies between writing ops compiled, for any number of tokens.

    The first dimension of every tensor argument (also in dataclasses) is taken as dynamic. The
    ops still go through the dispatcher, so a graph capture ends its segments at break ops.
    """
    pieces = _Pieces()
    compiled = torch.compile(_by_code_of_its_own(model), backend=pieces, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor in _tensors((args, kwargs)):
            if tensor.dim() > 0 and tensor.shape[0] > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        with _settings():
            return compiled(*args, **kwargs)

    return call


def _by_code_of_its_own(model: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler keeps and counts what it compiles by a function's code, which all models of a
    class share: the sixty-fifth engine of a process would be refused. By the code's name it also
    remembers which sizes have varied."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code: CodeType = forward.__code__.replace(co_name=f"model_{next(_numbers)}")
    return FunctionType(code, forward.__globals__, closure=forward.__closure__)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    # Without duck shaping: equal numbers of tokens and requests in one step must not become a
    # condition for the next.
    patch = shape_config.patch  # type: ignore[attr-defined]
    limit = torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS)
    with patch(use_duck_shape=False), limit:
        yield


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _tensors(each)
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for each in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, each.name))


class _Pieces:
    """A backend that splits the graph at writing ops and compiles each distinct piece once."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        self._compiled.clear()
        split, as_they_are = _split(module)
        mode = detect_fake_mode()
        assert mode is not None, "dynamo traces with fake tensors"
        fakes = [mode.from_tensor(e) if isinstance(e, Tensor) else e for e in examples]
        with mode:
            _PieceCompiler(split, as_they_are, self._compiled).run(*fakes)
        return split


class _PieceCompiler(fx.Interpreter):
    """Runs the split graph on fake tensors; replaces each piece by its compiled form."""

    def __init__(
        self,
        split: fx.GraphModule,
        as_they_are: set[str],
        compiled: dict[Any, Callable[..., Any]],
    ) -> None:
        super().__init__(split)
        self._split = split
        self._as_they_are = as_they_are
        self._compiled = compiled

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        piece = getattr(self._split, target)
        result = super().call_module(target, args, kwargs)
        if target not in self._as_they_are:
            key = _signature(piece, args)
            if key not in self._compiled:
                self._compiled[key] = _compile(piece, args)
            del self._split._modules[target]
            self._split.__dict__[target] = self._compiled[key]
        return result


def _compile(piece: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    function: Any = compile_fx(piece, list(examples))

    def call(*args: Any) -> Any:
        return launch(function, *args)

    return call


def _split(module: fx.GraphModule) -> tuple[fx.GraphModule, set[str]]:
    """The module as a chain of submodules, and the names of those that hold a writing op."""
    part, part_of, writing = 0, {}, set()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        op = find(node.target) if node.op == "call_function" else None
        if op is not None and (op.break_op or op.mutates):
            part += 1
            part_of[node] = part
            writing.add(f"submod_{part}")
            part += 1
        else:
            part_of[node] = part
    split = split_module(module, module, lambda node: part_of[node], keep_original_order=True)
    return split, writing


def _signature(piece: fx.GraphModule, examples: Sequence[Any]) -> Any:
    """Equal for pieces that one compilation serves: a decoder's layers differ in names alone."""
    number = {node: index for index, node in enumerate(piece.graph.nodes)}

    def rename(node: fx.Node) -> Any:
        return _Numbered(number[node])

    body = tuple(
        (
            node.op,
            str(node.target) if node.op != "placeholder" else "",
            str(fx.map_arg((node.args, node.kwargs), rename)),
        )
        for node in piece.graph.nodes
    )
    shapes = tuple(
        (str(each.dtype), str(tuple(each.shape)), str(each.stride()), str(each.device))
        if isinstance(each, Tensor)
        else str(each)
        for each in examples
    )
    return body, shapes


class _Numbered:
    def __init__(self, index: int) -> None:
        self._index = index

    def __repr__(self) -> str:
        return f"%{self._index}"
