"""``quant_method`` gptq: AutoGPTQ's and GPTQModel's layout, without act-order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.layers.destination import Destination, Implied, Place
from reprise.layers.formats.base import Columns, Formats, Rows
from reprise.layers.formats.fields import (
    HOW_IT_WAS_MADE,
    AllBut,
    Fields,
    stays_plain,
)
from reprise.layers.formats.four_bits import FourBits
from reprise.ops.w4_linear.reference import nibbles, pack


class Gptq(FourBits):
    """``qweight`` [in_features / 8, out_features] and ``qzeros`` [groups, out_features / 8] int32,
    ``scales`` [groups, out_features].

    A word of the first has eight neighbouring inputs, one of the second eight neighbouring outputs,
    from the lowest bits on. ``g_idx`` [in_features] says the group of each input, which without
    act-order follows from its place.

    Args:
        group: See :class:`FourBits`.
        zeros: See :class:`FourBits`. Without, what is stored must be the middle in one of the two
            conventions: some checkpoints say the first and have the second.
        less: What is stored is less than what is meant by this: 1 in the first convention.
    """

    outputs_together = 8

    def __init__(self, group: int | None, *, zeros: bool, less: int) -> None:
        super().__init__(group, zeros=zeros)
        self.less = less

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        groups = self.group_columns(columns)
        words = columns.per(-(-columns.size // 8))
        here = slice(rows.begin, rows.begin + rows.size)
        begin, end = rows.stored_begin, rows.stored_begin + rows.size
        outputs = slice(begin, end)
        yield "qweight", Destination(
            tensors["packed"][here], (words.part, outputs), (words.total, rows.stored_total),
            dtype=torch.int32, convert=lambda given: pack(nibbles(given.t())),
        )  # fmt: skip
        shape = (groups.total, rows.stored_total // 8)
        if self.zeros:
            # Four bits more than 15 begin anew (AutoGPTQ, GPTQModel).
            yield "qzeros", Destination(
                tensors["zeros"][here], (groups.part, slice(begin // 8, end // 8)), shape,
                dtype=torch.int32, convert=lambda given: nibbles(given).add(self.less).t() & 15,
            )  # fmt: skip
        else:
            yield "qzeros", Implied(shape, torch.int32, _are_the_middle)
        yield (
            "scales",
            Destination(
                tensors["scales"][here],
                (groups.part, outputs),
                (groups.total, rows.stored_total),
                convert=Tensor.t,
            ),
        )
        size = self.group or columns.total
        yield (
            "g_idx",
            Implied((columns.total,), torch.int32, lambda given: _is_in_order(given, size)),
        )
        # AutoGPTQ stores one for products that have none.
        yield "bias", Implied((rows.stored_total,), torch.float32, _is_nothing)


def _are_the_middle(given: Tensor) -> str | None:
    values = nibbles(given).unique().tolist()
    if values in ([7], [8]):
        return None
    return f"zeros {values}, where sym says that all are 7 (8 in gptq_v2)"


def _is_in_order(given: Tensor, group: int) -> str | None:
    places = torch.arange(len(given), device=given.device) // group
    if torch.equal(given.long(), places):
        return None
    return "inputs are in another order than their groups (act-order), which is not supported"


def _is_nothing(given: Tensor) -> str | None:
    return "a bias, which this product does not have" if bool(given.any()) else None


def formats(config: Mapping[str, Any]) -> Formats:
    """See :func:`reprise.layers.formats.formats_of`."""
    fields = Fields(config)
    fields.require("quant_method", "gptq", default="gptq")
    fields.require("bits", 4, default=None, instead="use a checkpoint of four bits")
    group = fields.group_size("group_size", 128)
    fields.require(
        "desc_act", False, default=False,
        instead="use a checkpoint that was made with desc_act=False (no act-order)",
    )  # fmt: skip
    symmetric = fields.require("sym", True, False, default=True)
    written = {fields.take("checkpoint_format"), fields.take("format")} - {None} or {"gptq"}
    if not written <= {"gptq", "gptq_v2"} or len(written) > 1:
        raise fields.refused(
            f"checkpoint_format={sorted(map(str, written))} is not supported; supported: 'gptq', "
            "'gptq_v2'"
        )
    fields.require("is_marlin_format", False, default=False)
    fields.require("pack_dtype", "int32", default="int32")
    is_plain = stays_plain(fields)
    fields.leave(*HOW_IT_WAS_MADE)
    fields.end()
    format = Gptq(group, zeros=not symmetric, less=1 if written == {"gptq"} else 0)
    return AllBut(format, is_plain)
