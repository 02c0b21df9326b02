"""Products of few rows in C++: see ``few_rows.cpp``. Others are oneDNN's."""

from __future__ import annotations

import torch
from torch import Tensor

from reprise.ops.cpp import FLOAT, INT, KINDS, LONG, POINTER, Kernel, address, lies_as
from reprise.ops.linear import onednn
from reprise.ops.put_off import aside, puts_off

MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8 if onednn.HAS_BFLOAT16 else 256}
"""By dtype, up to how many rows these are faster; oneDNN has a processor's instructions for
bfloat16, if there are any, and so reaches the memory's rate with more of them. Where there are
none, torch's product takes three to ten times as long."""
_WRITE, _ADD, _GATED = range(3)

_few_rows = Kernel(
    "linear/few_rows.cpp",
    [
        ("threads", INT), ("mode", INT), ("gain_kind", INT), ("rows", LONG),
        ("outputs", LONG), ("inputs", LONG), ("x", POINTER), ("x_stride", LONG), ("gain", POINTER),
        ("weight", POINTER), ("weight_stride", LONG), ("bias", POINTER), ("out", POINTER),
        ("out_stride", LONG), ("eps", FLOAT),
    ],
)  # fmt: skip


def _takes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gain: Tensor | None = None,
    out: Tensor | None = None,
) -> bool:
    """Whether the kernel takes these operands; of others torch says what is wrong with them."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    return (
        rows <= MOST_ROWS.get(x.dtype, 0)
        and _few_rows.takes(x.dtype)
        and weight.dtype == x.dtype
        and weight.shape[1] == inputs
        and weight.stride(1) == 1
        and lies_as(bias, x.dtype, outputs)
        and (gain is None or (gain.dtype in KINDS and lies_as(gain, gain.dtype, inputs)))
        and (
            out is None
            or (out.dtype == x.dtype and out.shape == (rows, outputs) and out.stride(1) == 1
                and (out.stride(0) >= outputs or rows < 2))
        )
    )  # fmt: skip


def _product(
    x: Tensor,
    norm: tuple[Tensor, float] | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    mode: int,
) -> Tensor:
    rows, inputs = x.shape
    if x.stride(1) != 1:
        x = aside(x.contiguous)
    gain, eps = norm or (None, 0.0)
    _few_rows(
        x.dtype, (x, gain, weight, bias, out), torch.get_num_threads(), mode,
        0 if gain is None else KINDS[gain.dtype], rows, weight.shape[0], inputs, x.data_ptr(),
        x.stride(0), address(gain), weight.data_ptr(), weight.stride(0), address(bias),
        out.data_ptr(), out.stride(0), eps,
    )  # fmt: skip
    return out


@puts_off
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments as in the reference."""
    if not _takes(x, weight, bias):
        return aside(onednn.linear, x, weight, bias)
    return _product(x, None, weight, bias, x.new_empty(x.shape[0], weight.shape[0]), _WRITE)


@puts_off
def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.shape[0] % 2 or not _takes(x, weight, bias):
        return aside(onednn.gated_linear, x, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return _product(x, None, weight, bias, out, _GATED)


@puts_off
def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if not _takes(x, weight, bias, gain=norm_weight):
        return aside(onednn.norm_linear, x, norm_weight, eps, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    return _product(x, (norm_weight, eps), weight, bias, out, _WRITE)


@puts_off
def norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if weight.shape[0] % 2 or not _takes(x, weight, bias, gain=norm_weight):
        return aside(onednn.norm_gated_linear, x, norm_weight, eps, weight, bias)
    out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return _product(x, (norm_weight, eps), weight, bias, out, _GATED)


@puts_off
def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    if _takes(x, weight, bias, out=residual):
        _product(x, None, weight, bias, residual, _ADD)
    else:
        aside(onednn.linear_add, x, weight, bias, residual)


@puts_off
def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if _takes(x, weight, None, out=out):
        _product(x, None, weight, None, out, _WRITE)
    else:
        aside(onednn.linear_into, x, weight, out)
