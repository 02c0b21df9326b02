"""``quant_method`` awq: AutoAWQ's layout for its matrix-matrix kernel (``version`` gemm)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reprise.layers.destination import Destination, Place
from reprise.layers.formats.base import Columns, Formats, Rows
from reprise.layers.formats.fields import AllBut, Fields, is_head, is_router, is_within
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
    version = fields.take("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fields.refused(
            f"version={version!r} is not supported; supported: 'gemm', which AutoAWQ writes by "
            "default and whose layout the hub's checkpoints have"
        )
    plain = fields.names("modules_to_not_convert")
    fields.leave(
        "backend",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "modules_to_fuse",
        "bits_per_param",
    )
    fields.end()
    format = Awq(group, zeros=True)
    return AllBut(format, lambda path: is_head(path) or is_router(path) or is_within(path, plain))
