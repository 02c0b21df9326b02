from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reprise import ops
from reprise.layers.destination import Destination, Place
from reprise.ops.experts.reference import weighted_sum


class Rows(NamedTuple):
    """Output features that adjoin in a product and in a stored projection."""

    begin: int
    """The first of them in the product."""
    size: int
    """How many there are."""
    total: int
    """Of the product."""
    stored_begin: int
    """The first of them in the stored projection."""
    stored_total: int
    """Of the stored projection."""

    def of(self, tensor: Tensor, columns: Columns) -> Destination:
        """Those of a tensor that is stored as it is: its first dimension has a row for every output
        of the product, or one for every so many; its second, if it has one, likewise of inputs."""
        count = len(tensor)

        def rows(features: int) -> int:
            return features * count // self.total

        view = tensor[rows(self.begin) : rows(self.begin + self.size)]
        whole = slice(None)
        part, stored = whole, len(view)
        if self.size != self.stored_total:
            part = slice(rows(self.stored_begin), rows(self.stored_begin + self.size))
            stored = rows(self.stored_total)
        if tensor.dim() == 1 or columns.size == columns.total:
            if part == whole:
                return Destination(view)
            return Destination(view, (part,), (stored, *tensor.shape[1:]))
        inputs = columns.per(tensor.shape[1])
        return Destination(view, (part, inputs.part), (stored, inputs.total))


class Columns(NamedTuple):
    """Input features that a product has of those of the stored projection."""

    begin: int
    """The first of them there."""
    size: int
    """How many there are."""
    total: int
    """Of the stored projection."""

    @property
    def part(self) -> slice:
        """Where they are in a tensor that is stored with a column for each."""
        return slice(None) if self.size == self.total else slice(self.begin, self.begin + self.size)

    def per(self, count: int) -> Columns:
        """Counted in entries, of which the product has ``count``."""
        if self.size == self.total:
            return Columns(0, count, count)
        each = -(-self.size // count)
        return Columns(self.begin // each, count, -(-self.total // each))


ALL_INPUTS = Columns(0, 1, 1)
"""Where one entry stands for all inputs of an output."""


class Format(ABC):
    """Makes, names and multiplies the tensors that a product's weight is stored in.

    In what follows ``tensors`` are those that :meth:`tensors` made, filled by now, and ``bias``
    is [out_features] in the compute dtype, or None. Activations are [T, features] in the compute
    dtype. A format that can do more in one op than :meth:`linear` does overrides what is made of
    it here.
    """

    grain: tuple[int, int] = (1, 1)
    """Output and input features that one entry of some tensor stands for, as a scale of a block
    does. The parts of a merged product have multiples of the first; where a product is shared out
    over ranks by its inputs, each has a multiple of the second. Where that is 1, a tensor of one
    column stands for all inputs."""

    def merged(self, rows: Sequence[Rows]) -> Format:
        """The format of a product that is computed of several projections, or of parts of them.

        Args:
            rows: What it consists of, in its order.

        Raises:
            ValueError: Some of it is no multiple of :attr:`grain`.
        """
        for each in rows:
            if each.size % self.grain[0] or each.stored_begin % self.grain[0]:
                where = f" from feature {each.stored_begin} on" if each.stored_begin else ""
                raise ValueError(
                    f"{each.size} output features{where}, which must be a multiple of "
                    f"{self.grain[0]} where it is stored in blocks"
                )
        return self

    @abstractmethod
    def tensors(
        self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Unset tensors, by the last part of their names in a checkpoint, or by names of ours where
        :meth:`stored` says what they are made of.

        The first dimension of each is the output's: it has a row for every output feature, or one
        for every ``grain[0]`` of them.

        Args:
            out_features: Of the product; of all parts, where it is merged.
            in_features: Of the product.
            dtype: Compute dtype.
            device: Of the tensors; may be ``meta``.
        """

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        """What a checkpoint has of a projection, by the last part of the name: where it goes.

        Args:
            tensors: Of the product that the projection is computed in.
            rows: Those that are meant.
            columns: The inputs of the product.
        """
        for name, each in tensors.items():
            narrow = each.dim() > 1 and each.shape[1] == 1 and self.grain[1] == 1
            yield name, rows.of(each, ALL_INPUTS if narrow else columns)

    @abstractmethod
    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: [T, in_features] to [T, out_features]."""

    def wide(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """:meth:`linear` without a bias, in float32 as far as the format allows."""
        return self.linear(x, tensors, None).float()

    def by_groups(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """A product whose outputs are as many groups as x has, each of its own inputs.

        Args:
            x: [T, G, in_features].
            tensors: Of a product of G * N outputs, those of the first group first. N is a multiple
                of :attr:`grain`'s first.

        Returns:
            [T, G * N], contiguous.
        """
        groups = x.shape[1]
        parts = {name: each.unflatten(0, (groups, -1)) for name, each in tensors.items()}
        found = [
            self.linear(x[:, each], {name: part[each] for name, part in parts.items()}, None)
            for each in range(groups)
        ]
        return torch.cat(found, dim=1)

    def rotated_by_groups(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        groups: int,
        tensors: Mapping[str, Tensor],
    ) -> Tensor:
        """:meth:`by_groups` of heads [T, H, D] that are rotated back, see
        :func:`reprise.ops.rotary_tail`: [T, G * N]."""
        rotated = ops.rotary_tail(x, positions, cos_sin, 0.0, True)
        return self.by_groups(rotated.view(len(x), groups, -1), tensors)

    def gated(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """``silu(first half) * second half`` of :meth:`linear`: to [T, out_features / 2]."""
        return ops.silu_and_mul(self.linear(x, tensors, bias))

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """:meth:`linear` of x after its root mean square norm."""
        return self.linear(ops.rms_norm(x, norm_weight, eps), tensors, bias)

    def norm_gated(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """:meth:`gated` of x after its root mean square norm."""
        return self.gated(ops.rms_norm(x, norm_weight, eps), tensors, bias)

    def add(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, residual: Tensor
    ) -> None:
        """Add :meth:`linear` to ``residual`` [T, out_features], in place."""
        residual.add_(self.linear(x, tensors, bias))

    def into(
        self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, out: Tensor
    ) -> None:
        """Write :meth:`linear` into ``out`` [T, out_features]."""
        out.copy_(self.linear(x, tensors, bias))

    def stack(
        self, count: int, out_features: int, in_features: int, dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tensors of ``count`` products of equal sizes, unset: those of :meth:`tensors`, each with
        one more dimension in front."""
        one = self.tensors(out_features, in_features, dtype, torch.device("meta"))
        return {
            name: torch.empty(count, *each.shape, dtype=each.dtype, device=device)
            for name, each in one.items()
        }

    def grouped(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        limit: float = 0.0,
    ) -> Tensor:
        """The weighted sum of what each row's experts give: see :func:`reprise.ops.experts`.

        As it stands here every expert computes all rows, and what it was not asked for is left
        out: right for any format, and as slow as a dense model of all its weights. A format that
        is used with experts has an op for it.

        Args:
            x: [T, in_features].
            weights: [T, K] float32.
            ids: [T, K] int32; a number that is no expert's adds nothing.
            gate_up: A :meth:`stack`; the first half of each product's features are gates.
            down: A :meth:`stack` of as many, back to [T, in_features].
            limit: What gates and ups are clamped to; 0: they are not.
        """

        def product(expert: int) -> Tensor:
            first = {name: each[expert] for name, each in gate_up.items()}
            if limit:
                hidden = ops.swiglu_clamp(self.linear(x, first, None), limit)
            else:
                hidden = self.gated(x, first, None)
            return self.linear(hidden, {name: each[expert] for name, each in down.items()}, None)

        return weighted_sum(x, weights, ids, len(next(iter(gate_up.values()))), product)

    def grouped_add(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        residual: Tensor,
    ) -> None:
        """Add :meth:`grouped` to ``residual`` [T, in_features], in place."""
        residual.add_(self.grouped(x, weights, ids, gate_up, down))

    def fill_at_random(self, tensors: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Fill in place, for weights that no checkpoint has: matrices as transformers initialises
        them (normal, 0.02), and nothing else. A format of other numbers says what they are."""
        for each in tensors.values():
            if each.dim() > 1:
                each.normal_(0.0, 0.02, generator=generator)


class Formats(Protocol):
    """The formats of one checkpoint."""

    def of(self, path: str) -> Format:
        """The format of the weight of the module that is called this in the checkpoint."""
