"""The device's library for products of many rows, where its bits are those of our kernel.

A library takes other kernels for other numbers of rows, in ways that are not documented. Most of
them have a program sum all inputs of a tile, in their order and by the instruction that
:mod:`shared_sums_kernel` uses; then they give the same bits as it does, and are faster. Which one
is taken follows from shapes, places and settings, not from numbers. So each is compared with ours
before it is used, once for a weight's shape and a number of rows: on numbers whose products cancel,
where nothing is left of a sum but what was lost by rounding, and every other order loses something
else. What was not compared, or had one other bit, our kernel computes.

Rehearsals are where that happens, and theirs are the numbers of rows: those of decode and mixed
graphs, and of the largest step. There is time before requests come, and memory that a step will
need. A rank that has the answer later than others computes the same meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch
from torch import Tensor

from reprise.ops.linear.shared_sums_kernel import launch_product
from reprise.ops.registry import active_platform
from reprise.ops.rehearsal import rehearsing
from reprise.ops.silu_and_mul.triton import silu_and_mul
from reprise.ops.triton_util import cdiv
from reprise.platforms.device_graph import capturing

logger = logging.getLogger(__name__)

_FEWEST_ROWS = 65
"""Fewer wait for the weights, with either."""
_FEWEST_WEIGHTS = 1 << 23
"""Elements of a weight: smaller ones take as long with either."""
_MOST_WEIGHTS = 1 << 27
"""From so many on, which a head has, none is made to be compared on: a step may have no room."""
_ALIGNMENT = 256
"""Bytes: kernels may be chosen by where operands begin, too."""
_DIFFERENT = 256
"""Rows, and rows of a weight, to compare on: those behind them are the same again, so there is
little to make, and our kernel, whose bits of a row depend on no other, computes no more of them."""
_BINARY_ORDERS = 8
"""Numbers are so much smaller and larger than 1: of like ones few bits are, and sums lose none."""

_answers: dict[Hashable, bool] = {}
"""By all that a library may choose by."""
_told: set[Hashable] = set()
"""Products of which there was a line of the log for some number of rows."""


def library_has_same_bits(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool = False,
    residual: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether :func:`by_library` gives what our kernel does, to the bit.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N], or None.
        gated: The activation comes behind the product.
        residual: [T, N], which the product is added to.
    """
    (rows, inputs), outputs = x.shape, len(weight)
    if rows < _FEWEST_ROWS or not _FEWEST_WEIGHTS <= outputs * inputs < _MOST_WEIGHTS:
        return False
    operands = (x, weight) if residual is None else (x, weight, residual)
    dtype, platform = x.dtype, active_platform()
    if platform is None or bias is not None or dtype is torch.float32:
        return False
    settings = platform.product_settings()
    if settings is None or not all(each.dtype is dtype and _plain(each) for each in operands):
        return False
    key = (x.device, dtype, rows, outputs, inputs, gated, residual is not None, settings)
    answer = _answers.get(key)
    if answer is None:
        if not rehearsing() or capturing():
            return False
        answer = _answers[key] = _compare(x, outputs, gated, residual is not None)
        product = (outputs, inputs, gated, residual is not None)
        logger.log(
            logging.DEBUG if product in _told else logging.INFO,
            "batch_invariant: %d rows of a product of %d inputs and %d outputs: %s",
            rows, inputs, outputs, "the library, whose bits are our kernel's" if answer
            else "our kernel, since the library's bits are others",
        )  # fmt: skip
        _told.add(product)
    return answer


def by_library(
    x: Tensor, weight: Tensor, *, gated: bool = False, residual: Tensor | None = None
) -> Tensor:
    """``x @ weight.T``, or ``silu(first half) * second half`` of it, or ``residual`` with it added
    in place."""
    if residual is not None:
        return torch.addmm(residual, x, weight.t(), out=residual)
    product = torch.mm(x, weight.t())
    return silu_and_mul(product) if gated else product


def _plain(operand: Tensor) -> bool:
    """Whether the operand is laid out as those that the comparison was made on."""
    return operand.is_contiguous() and operand.data_ptr() % _ALIGNMENT == 0


def _compare(x: Tensor, outputs: int, gated: bool, added: bool) -> bool:
    """Whether both give the same for rows and a weight of such shapes."""
    few, weight = _cancelling(x, outputs)
    residual = _numbers_near_them(x, outputs) if added else None
    found = by_library(_repeated(few, len(x)), weight, gated=gated, residual=residual)
    ours = _numbers_near_them(few, outputs) if added else torch.zeros_like(found[: len(few)])
    # This waits: our kernel reads a weight before what is in front of it has ended.
    if torch.equal(found[: len(few)], ours):
        return False  # nothing was lost of any sum, so nothing tells orders apart
    launch_product(few, weight, None, ours, gated=gated, add=added)
    return all(
        torch.equal(each.view(torch.int16), ours[: len(each)].view(torch.int16))
        for each in found.split(len(few))
    )


def _cancelling(x: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Rows, no more than ``x`` has, and a weight, of which each product is 0 but for rounding."""
    inputs, device = x.shape[1], x.device
    half = inputs // 2
    make = torch.Generator(device).manual_seed(0)
    order = torch.randperm(inputs, generator=make, device=device)

    def numbers(most: int, sign: int) -> Tensor:
        shape = min(most, _DIFFERENT), half
        some = torch.randn(shape, generator=make, device=device, dtype=torch.float32)
        orders = torch.arange(-_BINARY_ORDERS, _BINARY_ORDERS + 1, device=device)
        which = torch.randint(len(orders), shape, generator=make, device=device)
        some = torch.ldexp(some, orders[which])
        rest = some.new_zeros(len(some), inputs - 2 * half)
        return torch.cat((some, sign * some, rest), dim=1).to(x.dtype)[:, order]

    return numbers(len(x), -1), _repeated(numbers(outputs, 1), outputs)


def _repeated(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(cdiv(count, len(rows)), 1)[:count]


def _numbers_near_them(x: Tensor, outputs: int) -> Tensor:
    """What their products are added to, for as many rows as ``x`` has."""
    numbers = torch.linspace(
        -1 / 64, 1 / 64, outputs, dtype=torch.float32, device=x.device
    ).to(x.dtype)  # fmt: skip
    return numbers.repeat(len(x), 1)
