"""Declare an op once; everything else that needs to know about it asks here.

A declaration drives the ``torch.library`` registration (so that the dispatcher, fake tensors and
``torch.compile`` know the op), the choice of an implementation by platform, the split points of
piecewise graph executors (break ops), and the table that ``reprise doctor`` prints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from reprise.errors import OpError
from reprise.ops import put_off
from reprise.ops.cases import Cases
from reprise.ops.declaration import Op as Op
from reprise.ops.declaration import declared, nothing
from reprise.ops.implementation import GraphSupportOn, InvariantOn
from reprise.ops.implementation import needs_triton as needs_triton
from reprise.ops.implementation import on_an_accelerator as on_an_accelerator
from reprise.ops.implementation import on_the_host as on_the_host
from reprise.ops.implementation import runs_anywhere as runs_anywhere
from reprise.ops.interception import Interceptor as Interceptor
from reprise.ops.interception import intercept as intercept
from reprise.ops.interception import interceptor
from reprise.ops.table import OpTable as OpTable
from reprise.ops.table import active, table_of
from reprise.ops.table import active_platform as active_platform
from reprise.ops.table import op_memory as op_memory

_library = torch.library.Library("reprise", "DEF")


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
    strided: tuple[str, ...] = (),
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
        strided: Names of vectors whose numbers need not adjoin; kernels take others' to.
        error: Of the reference implementation, see :class:`Implementation`.
        fake: Output shapes and dtypes without data; needed unless the op returns nothing.
        graph_support: Of the reference implementation; ``never`` by default for a break op.
        batch_invariant: Of the reference implementation, see :class:`Implementation`.
    """
    if name in declared:
        raise OpError(f"op {name!r} is already declared")
    signature = inspect.signature(reference, eval_str=True)
    returns = signature.return_annotation
    if extent is not None and extent not in signature.parameters:
        raise OpError(f"op {name!r}: extent={extent!r} is no argument of it")
    if not set(state) <= set(mutates):
        raise OpError(f"op {name!r}: state={state!r} must be among mutates={mutates!r}")
    if not {*rows, *requests, *strided} <= set(signature.parameters):
        raise OpError(
            f"op {name!r}: rows={rows!r}, requests={requests!r} and strided={strided!r} must be "
            "arguments"
        )
    if fake is None and returns is not None:
        raise OpError(f"op {name!r} returns a value and declares no fake implementation")
    if break_op and returns is not None:
        raise OpError(f"break op {name!r} must write into its arguments and return nothing")
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    found = Op(
        name, schema, mutates, break_op, cases, extent, state, collective, rows, requests,
        strided, fake=fake or nothing,
    )  # fmt: skip
    found.implementation(
        "reference",
        reference,
        graph_support=graph_support or ("never" if break_op else "always"),
        error=error,
        batch_invariant=batch_invariant,
    )

    def kernel(*args: Any, **kwargs: Any) -> Any:
        table = active.get()
        if table is None:
            table = table_of((*args, *kwargs.values()))
            table.refuse_gaps(found, args, kwargs)
        if torch.is_grad_enabled():
            table.refuse_gradients(found, args, kwargs)
        function, instead = table.functions[name], interceptor.get()
        if instead is not None:
            return put_off.aside(instead, found, function, args, kwargs)
        if put_off.here.open and not getattr(function, "puts_off", False):
            return put_off.aside(function, *args, **kwargs)
        return function(*args, **kwargs)

    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    found.kernel, found.table = kernel, table_of
    torch.library.register_fake(f"reprise::{name}", found.fake)
    found.overload = getattr(torch.ops.reprise, name).default
    declared[name] = found
    return found


def all_ops() -> Mapping[str, Op]:
    """Every declared op by name. Import ``reprise.ops`` first: that declares the built-in ones."""
    return declared


def find(overload: Any) -> Op | None:
    """The declared op behind a dispatcher overload, or None if it is not one of ours."""
    if getattr(overload, "namespace", None) != "reprise":
        return None
    return declared.get(overload.name().removeprefix("reprise::"))
