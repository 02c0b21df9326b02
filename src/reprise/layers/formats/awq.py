"""``quant_method`` awq: AutoAWQ's layout for its matrix-matrix kernel (``version`` gemm)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.layers.destination import Destination, Place
from reprise.layers.formats.base import Columns, Formats, Rows
from reprise.layers.formats.fields import (
    HOW_IT_WAS_MADE,
    AllBut,
    Fields,
    stays_plain,
)
from reprise.layers.formats.four_bits import FourBits
from reprise.ops.w4_linear.reference import pack, unpack


class Awq(FourBits):
    """``qweight`` [in_features, out_features / 8] and ``qzeros`` [groups, out_features / 8] int32,
    ``scales`` [groups, out_features].

    A word has eight neighbouring outputs in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits
    on.
    """

    outputs_together = 8

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        groups = self.group_columns(columns)
        here = slice(rows.begin, rows.begin + rows.size)
        begin, end = rows.stored_begin, rows.stored_begin + rows.size
        words = slice(begin // 8, end // 8)
        total = rows.stored_total // 8
        yield "qweight", Destination(
            tensors["packed"][here], (columns.part, words), (columns.total, total),
            dtype=torch.int32, convert=lambda given: pack(unpack(given).t()),
        )  # fmt: skip
        yield "qzeros", Destination(
            tensors["zeros"][here], (groups.part, words), (groups.total, total),
            dtype=torch.int32, convert=lambda given: unpack(given).t(),
        )  # fmt: skip
        yield "scales", Destination(
            tensors["scales"][here], (groups.part, slice(begin, end)),
            (groups.total, rows.stored_total), convert=Tensor.t,
        )  # fmt: skip


def formats(config: Mapping[str, Any]) -> Formats:
    """See :func:`reprise.layers.formats.formats_of`."""
    fields = Fields(config)
    fields.require("quant_method", "awq", default="awq")
    fields.require("bits", 4, default=fields.take("w_bit", 4))
    group = fields.group_size("group_size", fields.take("q_group_size", 128))
    fields.require(
        "zero_point",
        True,
        default=True,
        instead="AutoAWQ stores no symmetric weights in this layout",
    )
    for name in ("version", "format", "checkpoint_format"):
        version = fields.take(name, "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise fields.refused(
                f"{name}={version!r} is not supported; supported: 'gemm', which AutoAWQ writes by "
                "default and whose layout the hub's checkpoints have"
            )
    fields.require("desc_act", False, default=False)
    fields.require("pack_dtype", "int32", default="int32")
    is_plain = stays_plain(fields)
    # Whatever sym says, zero points are stored.
    fields.leave("sym", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "bits_per_param")
    fields.leave(*HOW_IT_WAS_MADE)
    fields.end()
    return AllBut(Awq(group, zeros=True), is_plain)
