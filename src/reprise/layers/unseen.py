"""Modules between whose ops nothing looks at a number, so that the ops may be put off."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from reprise.layers.attention import SelfAttention
from reprise.layers.formats import DENSE
from reprise.layers.linear import Linear
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import CentredRMSNorm, RMSNorm

_KNOWN = (SelfAttention, GatedMLP, Linear, RMSNorm, CentredRMSNorm)
"""Which do nothing with tensors but call ops, make views and make new ones."""


class Unseen:
    """Whether the forward passes of some modules only hand on what ops compute.

    Known of exactly these classes and of plain weights; a subclass may do anything, and so may
    hooks, for which it looks each time.

    Args:
        modules: Those, of which all parts count.
        others: Further classes of which it is known.
    """

    def __init__(self, modules: Iterable[nn.Module], *others: type[nn.Module]) -> None:
        self._parts = [part for each in modules for part in each.modules()]
        known = (*_KNOWN, *others)
        self._known = all(
            type(each) in known and (not isinstance(each, Linear) or each.format is DENSE)
            for each in self._parts
        )

    def now(self) -> bool:
        """They do, as they are at the moment. A compiler is told no: it sees everything."""
        return self._known and not (
            torch.compiler.is_compiling()
            or _has_any_global_hook()
            or any(
                each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each)
                for each in self._parts
            )
        )
