"""Declare an op once; everything else that needs to know about it asks here.

A declaration drives the ``torch.library`` registration (so that the dispatcher, fake tensors and
``torch.compile`` know the op), the choice of an implementation by platform, the split points of
piecewise graph executors (break ops), and the table that ``reprise doctor`` prints.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch

from reprise import platforms
from reprise.errors import OpError
from reprise.ops import put_off
from reprise.ops.cases import Cases
from reprise.ops.choice import NOT_INVARIANT, ByArguments, resolved
from reprise.ops.implementation import (
    Accepts,
    GraphSupportOn,
    Implementation,
    InvariantOn,
    Requirement,
    anything,
)
from reprise.ops.implementation import needs_triton as needs_triton
from reprise.ops.implementation import needs_warpgroups as needs_warpgroups
from reprise.ops.implementation import on_an_accelerator as on_an_accelerator
from reprise.ops.implementation import on_the_host as on_the_host
from reprise.ops.implementation import runs_anywhere as runs_anywhere
from reprise.ops.interception import Interceptor as Interceptor
from reprise.ops.interception import intercept as intercept
from reprise.ops.interception import interceptor
from reprise.platforms import Platform

_library = torch.library.Library("reprise", "DEF")
_ops: dict[str, Op] = {}
_active: contextvars.ContextVar[OpTable | None] = contextvars.ContextVar("op_table", default=None)
_defaults: dict[str, OpTable] = {}
_memory_outside_engines: dict[str, torch.Tensor] = {}


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@dataclass
class Op:
    """A declared op. Calling it goes through the dispatcher to the chosen implementation."""

    name: str
    schema: str
    """In torch.library's notation, without the name: ``(Tensor x, ...) -> Tensor``."""
    mutates: tuple[str, ...]
    """Names of the arguments that the op writes."""
    break_op: bool
    """The op must run outside the graph in piecewise executors."""
    cases: Cases
    """Inputs that its implementations are compared, timed and compiled on."""
    extent: str | None = None
    """The argument that says how far the op reaches into each request, if one does."""
    state: tuple[str, ...] = ()
    """Those of :attr:`mutates` that live on from step to step."""
    collective: bool = False
    """It waits for other ranks: all call it in one order, and none in a thread of its own."""
    rows: tuple[str, ...] = ()
    """Arguments whose first dimension counts tokens; of what it returns, the first counts them
    too."""
    requests: tuple[str, ...] = ()
    """Arguments whose first dimension counts requests, which have rows by ``query_start_loc``."""
    implementations: dict[str, Implementation] = field(default_factory=dict)
    overload: Any = None
    kernel: Any = None
    """What the overload comes down to: the implementation of the active table."""
    fake: Callable[..., Any] = _nothing
    """Returns what the op would, with memory of any content."""

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(each.name for each in self.overload._schema.arguments)

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    def written(self, named: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Those of a call's arguments that the op writes; it may be called without some."""
        found = {name: named.get(name) for name in self.mutates}
        return {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The dispatcher is for those who look on: compilers and recorders. Without them the way
        # through it would be a tenth of what the host does in an eager step.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.overload(*args, **kwargs)
        return self.kernel(*args, **kwargs)

    def repeatedly(self, *args: Any, others: int = 0) -> Callable[..., Any]:
        """Compute, and return a function that computes again on the same tensors: see ``bind`` of
        :class:`Implementation`.

        Args:
            args: Of the call.
            others: So many of the last ones are the function's own arguments, other ones each time.
        """
        table = _active.get() or _default_table(args)
        bind = getattr(resolved(table.functions[self.name], args, {}), "bind", None)
        if bind is not None and interceptor.get() is None:
            return cast("Callable[..., Any]", bind(*args))
        self(*args)
        return functools.partial(self, *args[: len(args) - others])

    def implementation(
        self,
        name: str,
        target: str | Callable[..., Any],
        *,
        requires: Requirement = runs_anywhere,
        accepts: Accepts = anything,
        graph_support: GraphSupportOn = "always",
        error: float | None = None,
        on_request: str | None = None,
        batch_invariant: InvariantOn = False,
    ) -> None:
        """Add a way to compute this op.

        Args:
            name: How ``--op NAME=IMPL`` and ``Platform.preferred`` call it.
            target: A function with the op's signature, or ``"module:function"`` to import late.
            requires: Says whether a platform can run it.
            accepts: Says whether it computes calls with such arguments. The next one that is
                wanted computes those that it does not; the reference takes everything.
            graph_support: For break ops, the steps in which it may be captured; ``never`` of any
                other op excludes graphs. It may be a function of the platform.
            error: See :class:`Implementation`; graphs with an exact one are compared bit by bit.
            on_request: Why it computes only where ``--op NAME=IMPL`` asks for it, such as that no
                device has run it yet. None: it is chosen as any other.
            batch_invariant: See :class:`Implementation`; what engines with that option choose from.
        """
        if name in self.implementations:
            raise OpError(f"op {self.name!r} already has an implementation {name!r}")
        self.implementations[name] = Implementation(
            self.name, name, target, requires, graph_support, error, accepts, on_request,
            batch_invariant,
        )  # fmt: skip

    def candidates(
        self, platform: Platform, override: str | None = None, *, batch_invariant: bool = False
    ) -> list[Implementation]:
        """The implementations to use on ``platform``, most wanted first: each computes what those
        before it do not accept, and the last accepts everything, unless it is the override.

        With ``batch_invariant`` only those that are; there may be none, and the last may refuse.

        Raises:
            OpError: ``override`` names none, one that this platform cannot run or that does not
                import, or one that is not batch-invariant and has to be.
        """
        if override is not None:
            chosen = self.implementations.get(override)
            if chosen is None:
                raise OpError(
                    f"op {self.name!r} has no implementation {override!r}; "
                    f"it has: {', '.join(self.implementations)}"
                )
            reason = chosen.unusable(platform)
            if reason is not None:
                raise OpError(f"--op {self.name}={override}: {reason} ({platform.name})")
            if batch_invariant and not chosen.batch_invariant_on(platform):
                raise OpError(
                    f"--op {self.name}={override}: bits of a row depend on other rows there, which "
                    f"batch_invariant=True rules out; {self.invariant_ones(platform)}"
                )
            return [chosen]
        order = platform.preferred.get(self.name, platform.preferred.get("*", ()))
        if batch_invariant:
            order = (*order, *self.implementations)
        found: list[Implementation] = []
        for name in dict.fromkeys((*order, "reference")):
            candidate = self.implementations.get(name)
            if candidate is None or candidate.on_request is not None:
                continue
            if batch_invariant and not candidate.batch_invariant_on(platform):
                continue
            if candidate.unusable(platform) is None:
                found.append(candidate)
                if candidate.accepts is anything:
                    return found
        if batch_invariant:
            return found
        raise OpError(f"op {self.name!r} has no implementation for platform {platform.name!r}")

    def invariant_ones(self, platform: Platform) -> str:
        """For people: the implementations that are batch-invariant on the platform."""
        found = [
            f"--op {self.name}={name}" + ("" if each.on_request is None else f", {each.on_request}")
            for name, each in self.implementations.items()
            if each.batch_invariant_on(platform) and each.requires(platform) is None
        ]
        return ", ".join(found) or f"no other is batch-invariant on {platform.name}"

    def varies(self, platform: Platform) -> str:
        """Its name, with what could be asked for where it has no batch-invariant implementation
        that is chosen by itself."""
        asked = self.invariant_ones(platform)
        return f"{self.name} ({asked})" if asked.startswith("--op") else self.name


def op(
    name: str,
    reference: Callable[..., Any],
    *,
    cases: Cases,
    mutates: tuple[str, ...] = (),
    break_op: bool = False,
    extent: str | None = None,
    state: tuple[str, ...] = (),
    collective: bool = False,
    rows: tuple[str, ...] = (),
    requests: tuple[str, ...] = (),
    error: float | None = None,
    fake: Callable[..., Any] | None = None,
    graph_support: GraphSupportOn | None = None,
    batch_invariant: InvariantOn = False,
) -> Op:
    """Declare an op. Its reference implementation's signature becomes its schema.

    Args:
        name: Unique name; the op is ``torch.ops.reprise.<name>``.
        reference: Plain torch, runs on any device; the oracle of every other implementation.
        cases: Its inputs for comparison with the reference, for timing and for compilation.
        mutates: Names of arguments that the op writes.
        break_op: Whether piecewise graph executors must run it outside their graphs. Such an op
            writes into outputs that its caller allocated, and returns nothing.
        extent: Name of the argument that says how far the op reaches into each request: lengths
            or positions. Faults in graphs are planted there.
        state: Names among ``mutates`` of what lives on from step to step, such as a cache. What a
            break op writes beside it are outputs: a row of length 0 leaves zeros there.
        collective: Whether it waits for other ranks.
        rows: Names of arguments whose first dimension counts tokens, as that of the result does.
        requests: Names of arguments whose first dimension counts requests; ``query_start_loc``
            says which tokens are theirs.
        error: Of the reference implementation, see :class:`Implementation`.
        fake: Output shapes and dtypes without data; needed unless the op returns nothing.
        graph_support: Of the reference implementation; ``never`` by default for a break op.
        batch_invariant: Of the reference implementation, see :class:`Implementation`.
    """
    if name in _ops:
        raise OpError(f"op {name!r} is already declared")
    signature = inspect.signature(reference, eval_str=True)
    returns = signature.return_annotation
    if extent is not None and extent not in signature.parameters:
        raise OpError(f"op {name!r}: extent={extent!r} is no argument of it")
    if not set(state) <= set(mutates):
        raise OpError(f"op {name!r}: state={state!r} must be among mutates={mutates!r}")
    if not {*rows, *requests} <= set(signature.parameters):
        raise OpError(f"op {name!r}: rows={rows!r} and requests={requests!r} must be arguments")
    if fake is None and returns is not None:
        raise OpError(f"op {name!r} returns a value and declares no fake implementation")
    if break_op and returns is not None:
        raise OpError(f"break op {name!r} must write into its arguments and return nothing")
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    declared = Op(
        name, schema, mutates, break_op, cases, extent, state, collective, rows, requests,
        fake=fake or _nothing,
    )  # fmt: skip
    declared.implementation(
        "reference",
        reference,
        graph_support=graph_support or ("never" if break_op else "always"),
        error=error,
        batch_invariant=batch_invariant,
    )

    def kernel(*args: Any, **kwargs: Any) -> Any:
        table = _active.get() or _default_table((*args, *kwargs.values()))
        function, instead = table.functions[name], interceptor.get()
        if instead is not None:
            return instead(declared, function, args, kwargs)
        if put_off.here.open and not getattr(function, "puts_off", False):
            return put_off.aside(function, *args, **kwargs)
        return function(*args, **kwargs)

    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    declared.kernel = kernel
    torch.library.register_fake(f"reprise::{name}", declared.fake)
    declared.overload = getattr(torch.ops.reprise, name).default
    _ops[name] = declared
    return declared


def all_ops() -> Mapping[str, Op]:
    """Every declared op by name. Import ``reprise.ops`` first: that declares the built-in ones."""
    return _ops


def find(overload: Any) -> Op | None:
    """The declared op behind a dispatcher overload, or None if it is not one of ours."""
    if getattr(overload, "namespace", None) != "reprise":
        return None
    return _ops.get(overload.name().removeprefix("reprise::"))


class OpTable:
    """The implementation of every op that one engine uses. Active while the engine computes."""

    def __init__(
        self,
        platform: Platform,
        overrides: Mapping[str, str] | None = None,
        *,
        batch_invariant: bool = False,
    ) -> None:
        """Choose once.

        Args:
            platform: The device.
            overrides: Op name to the implementation to use instead of the platform's choice.
            batch_invariant: Use only implementations whose bits of a row depend on that row alone.
                An op that has none here cannot be called.

        Raises:
            OpError: An override names an unknown op, or an implementation that cannot run here, or
                one that is not batch-invariant and has to be.
        """
        overrides = overrides or {}
        for name in overrides:
            if name not in _ops:
                raise OpError(f"--op {name}=...: no such op; known: {', '.join(sorted(_ops))}")
        self.platform = platform
        self.batch_invariant = batch_invariant
        self.candidates = {
            name: each.candidates(platform, overrides.get(name), batch_invariant=batch_invariant)
            for name, each in _ops.items()
        }
        """By op, most wanted first; see :meth:`Op.candidates`."""
        self.choices: dict[str, ByArguments] = {}
        """The ops for which the arguments decide, and the answers given so far."""
        self.functions = _LateFunctions(self)
        self.memory: dict[str, torch.Tensor] = {}

    @property
    def chosen(self) -> dict[str, Implementation]:
        """The implementation of each op that is wanted most; none of an op that has none."""
        return {name: found[0] for name, found in self.candidates.items() if found}

    def implementation_of(
        self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Implementation:
        """What computes this call of ``op`` here.

        Raises:
            OpError: The user asked for an implementation that does not accept it, or there is none
                that is batch-invariant and has to be.
        """
        self.functions[op.name]  # chooses, if the op was declared after the table was made
        choice = self.choices.get(op.name)
        if not self.candidates[op.name]:
            _refuse(op, self.platform)
        if choice is None:
            return self.candidates[op.name][0]
        return choice.answer(args, kwargs).implementation

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Route op calls of this thread to this table within the ``with`` block."""
        return _Active(self, inference=False)

    def is_computing(self) -> bool:
        """This thread is in a ``with`` block of :meth:`computing` already."""
        return _active.get() is self and torch.is_inference_mode_enabled()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """:meth:`activate`, and compute without gradients."""
        return _Active(self, inference=not torch.is_inference_mode_enabled())


class _Active:
    """A class and no generator: every step enters two of these, and each would cost as much as a
    launch."""

    __slots__ = ("_inference", "_table", "_token")

    def __init__(self, table: OpTable, *, inference: bool) -> None:
        self._table = table
        self._inference = torch.inference_mode() if inference else None

    def __enter__(self) -> None:
        if self._inference is not None:
            self._inference.__enter__()
        self._token = _active.set(self._table)

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._token)
        if self._inference is not None:
            self._inference.__exit__(*error)


class _LateFunctions(dict[str, Callable[..., Any]]):
    """Op name to function; chooses for ops that were declared after the table was made."""

    def __init__(self, table: OpTable) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, name: str) -> Callable[..., Any]:
        table, op = self._table, _ops[name]
        if name not in table.candidates:  # declared after the table was made
            table.candidates[name] = op.candidates(
                table.platform, batch_invariant=table.batch_invariant
            )
        candidates = table.candidates[name]
        if not candidates:
            self[name] = functools.partial(_refuse, op, table.platform)
        elif candidates[0].accepts is anything:
            self[name] = candidates[0].function
        else:
            self[name] = table.choices[name] = ByArguments(
                name, op.named, candidates, table.batch_invariant
            )
        return self[name]


def _refuse(op: Op, platform: Platform, *args: Any, **kwargs: Any) -> NoReturn:
    """Stands for an op that has no batch-invariant implementation where it has to be."""
    raise OpError(f"{NOT_INVARIANT}{op.varies(platform)} on {platform.name}")


def active_platform() -> Platform | None:
    """The platform of the engine that computes in this thread; None outside of one."""
    table = _active.get()
    return None if table is None else table.platform


def op_memory() -> dict[str, torch.Tensor]:
    """What implementations keep on the device from call to call; one for each engine.

    Graph verification compares it, and puts it back, as it does the cache slots. To be made in an
    eager call, never under capture: then it would lie in the memory of a graph's pool.
    """
    table = _active.get()
    return _memory_outside_engines if table is None else table.memory


def _default_table(args: tuple[Any, ...]) -> OpTable:
    """For calls outside an engine: the table of the platform that owns the first tensor."""
    device = next(each.device for each in args if isinstance(each, torch.Tensor))
    if device.type not in _defaults:
        usable = [platforms.load(n) for n, why in platforms.available().items() if why is None]
        owner = next((each for each in usable if each.device_type == device.type), None)
        if owner is None:
            raise OpError(f"no available platform owns tensors on {device}")
        _defaults[device.type] = OpTable(owner(device.index or 0))
    return _defaults[device.type]
