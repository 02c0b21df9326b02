"""Wrong ways to multiply quantised weights, as kernels have had them: for tests that compare ops.

Each takes what computes the op right, and the arguments by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reprise.ops.fp8_linear.reference import dequantise
from reprise.ops.registry import Op

Compute = Callable[..., Tensor]
WrongProduct = Callable[[Compute, dict[str, Any]], Tensor]


def wrong_scale(compute: Compute, named: dict[str, Any]) -> Tensor:
    """One scale is a sixteenth too large."""
    name = _scales(named)
    scales = named[name].clone()
    scales[-1, -1] *= 1 + 1 / 16
    return compute(**{**named, name: scales})


def shifted_group(compute: Compute, named: dict[str, Any]) -> Tensor:
    """Each group of inputs has the scales of its neighbour."""
    name = _scales(named)
    return compute(**{**named, name: named[name].roll(1, dims=1)})


def shifted_outputs(compute: Compute, named: dict[str, Any]) -> Tensor:
    """Each output, or block of them, has the scales of its neighbour."""
    name = _scales(named)
    return compute(**{**named, name: named[name].roll(1, dims=0)})


def swapped_nibbles(compute: Compute, named: dict[str, Any]) -> Tensor:
    """The four bits of each byte are in the other order."""
    pairs = named["packed"].contiguous().view(torch.uint8)
    return compute(**{**named, "packed": (pairs << 4 | pairs >> 4).view(torch.int32)})


def forgotten_zeros(compute: Compute, named: dict[str, Any]) -> Tensor:
    """The middle stands for zero, whatever is stored."""
    return compute(**{**named, "zeros": None})


def plain_activations(compute: Compute, named: dict[str, Any]) -> Tensor:
    """Activations are not quantised: another function, that looks like the better one."""
    weight = dequantise(named["weight"], named["scale"], named["block_n"], named["block_k"])
    product = named["x"].float() @ weight.t()
    return (product if named["bias"] is None else product + named["bias"]).to(named["x"].dtype)


def not_added(compute: Compute, named: dict[str, Any]) -> Tensor:
    """The product takes the place of the residual."""
    named["residual"].zero_()
    return compute(**named)


def forgotten_norm(compute: Compute, named: dict[str, Any]) -> Tensor:
    """The norm before the product has no gain."""
    return compute(**{**named, "norm_weight": torch.ones_like(named["norm_weight"])})


_OF_SCALES = (wrong_scale, shifted_group, shifted_outputs)
_OF_BITS = (swapped_nibbles, forgotten_zeros)
WRONG_PRODUCTS: dict[str, tuple[WrongProduct, ...]] = {
    "fp8_linear": (*_OF_SCALES, plain_activations),
    "fp8_norm_linear": (wrong_scale, forgotten_norm),
    "fp8_norm_gated_linear": (shifted_outputs, forgotten_norm),
    "fp8_linear_add": (shifted_group, not_added),
    "w4_linear": (*_OF_SCALES, *_OF_BITS),
    "w4_norm_linear": (swapped_nibbles, forgotten_norm),
    "w4_norm_gated_linear": (forgotten_zeros, shifted_outputs),
    "w4_linear_add": (wrong_scale, not_added),
}
"""By op."""


def _scales(named: dict[str, Any]) -> str:
    return "scales" if "scales" in named else "scale"


def wrongly(op: Op, fault: WrongProduct) -> Compute:
    """An implementation of ``op`` that has the fault."""
    reference = op.implementations["reference"].function

    def compute(*args: Any, **kwargs: Any) -> Tensor:
        return fault(reference, op.named(args, kwargs))

    return compute
