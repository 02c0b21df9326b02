"""What a decoder does right before or behind a product, for weights of any kind: ops of four names,
and implementations of all from one that computes no more than the product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from reprise.ops.implementation import Accepts, Requirement
from reprise.ops.registry import Op, needs_triton, op
from reprise.ops.rms_norm.accepts import sums_alone
from reprise.ops.rms_norm.reference import reference as rms_norm
from reprise.ops.silu_and_mul.reference import reference as silu_and_mul

Product = Callable[..., Tensor]
"""Its first argument is x [T, K]; what follows are weights, and what tells how they are stored."""


class Plain(NamedTuple):
    """An implementation of the product alone."""

    product: Product
    requires: Requirement
    accepts: Accepts


def declare(
    kind: str,
    reference: ModuleType,
    cases: ModuleType,
    plain: Mapping[str, Plain],
    accepts: Accepts,
    invariant: Mapping[str, Requirement],
) -> tuple[Op, Op, Op, Op]:
    """``KIND_linear``, ``KIND_norm_linear``, ``KIND_norm_gated_linear`` and ``KIND_linear_add``.

    The arguments of the product follow x, ``norm_weight`` and ``eps`` of those with a norm, and x
    and ``residual`` of the last.

    Args:
        kind: Of weights.
        reference: Has a function for each op, by its name, and its fake behind ``fake_``.
        cases: Has the cases of each op, by its name.
        plain: By the implementation's name.
        accepts: Of the implementations in Triton, which the module ``triton`` beside the reference
            has by the ops' names.
        invariant: Implementations whose bits of a row depend on that row alone, and where they run;
            modules beside the reference, as ``triton``.
    """

    def one(name: str, around: Callable[[Product], Callable[..., Any]], *mutates: str) -> Op:
        declared = op(
            name,
            getattr(reference, name),
            cases=getattr(cases, name),
            mutates=mutates,
            rows=("x", *mutates),
            fake=getattr(reference, f"fake_{name}", None),
        )
        for which, each in plain.items():
            computes = around(each.product)
            declared.implementation(which, computes, requires=each.requires, accepts=each.accepts)
        target = f"{reference.__package__}.triton:{name}"
        declared.implementation("triton", target, requires=needs_triton, accepts=accepts)
        for which, requires in invariant.items():
            takes = accepts if requires is needs_triton else sums_alone
            declared.implementation(
                which, f"{reference.__package__}.{which}:{name}", requires=requires,
                accepts=takes, batch_invariant=True,
            )  # fmt: skip
        return declared

    return (
        one(f"{kind}_linear", lambda product: product),
        one(f"{kind}_norm_linear", behind_norm),
        one(f"{kind}_norm_gated_linear", gated_behind_norm),
        one(f"{kind}_linear_add", added, "residual"),
    )


def behind_norm(product: Product) -> Product:
    """``product`` of x after its root mean square norm."""

    def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, *args: Any, **named: Any) -> Tensor:
        return product(rms_norm(x, norm_weight, eps), *args, **named)

    return norm_linear


def gated_behind_norm(product: Product) -> Product:
    """``silu(first half) * second half`` of that."""
    norm_linear = behind_norm(product)

    def norm_gated_linear(*args: Any, **named: Any) -> Tensor:
        return silu_and_mul(norm_linear(*args, **named))

    return norm_gated_linear


def added(product: Product) -> Callable[..., None]:
    """Adds ``product`` to a residual, in place."""

    def linear_add(x: Tensor, residual: Tensor, *args: Any, **named: Any) -> None:
        residual.add_(product(x, *args, **named))

    return linear_add
