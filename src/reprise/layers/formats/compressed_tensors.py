"""``quant_method`` compressed-tensors, as LLM Compressor writes it: weights and activations of
eight bits (FP8), or weights of four (``pack-quantized``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprise.layers.destination import Destination, Implied, Place
from reprise.layers.formats.base import Columns, Format, Formats, Rows
from reprise.layers.formats.dense import DENSE
from reprise.layers.formats.eight_bits import Blocks, Channels
from reprise.layers.formats.fields import Fields, check_cache_scheme
from reprise.layers.formats.four_bits import FourBits
from reprise.ops.w4_linear.reference import nibbles, pack

_SCALE = "weight_scale"


class PackedInts(FourBits):
    """``weight_packed`` [out_features, in_features / 8] int32, eight neighbouring inputs in a word
    from the lowest bits on; ``weight_scale`` [out_features, groups]; ``weight_zero_point``
    [out_features / 8, groups] int32, eight neighbouring outputs in a word; ``weight_shape``."""

    def stored(
        self, tensors: Mapping[str, Tensor], rows: Rows, columns: Columns
    ) -> Iterator[tuple[str, Place]]:
        packed = rows.of(tensors["packed"], columns)
        yield "weight_packed", packed._replace(convert=lambda given: pack(nibbles(given)))
        yield _SCALE, rows.of(tensors["scales"], self.group_columns(columns))
        if self.zeros:
            begin, end = rows.stored_begin, rows.stored_begin + rows.size
            groups = self.group_columns(columns)
            yield (
                "weight_zero_point",
                Destination(
                    tensors["zeros"][rows.begin : rows.begin + rows.size],
                    (slice(None), groups.part),
                    (-(-rows.stored_total // 8), groups.total),
                    dtype=torch.int32,
                    convert=lambda given: nibbles(given.t()).t()[begin:end],
                ),
            )
        size = [rows.stored_total, columns.total]
        yield "weight_shape", Implied((2,), torch.int64, lambda given: _is(given, size))


def _is(given: Tensor, size: list[int]) -> str | None:
    return None if given.tolist() == size else f"{given.tolist()} and not {size}"


class _Group(NamedTuple):
    """Products with one format."""

    targets: list[str]
    format: Format


class _Formats:
    def __init__(self, groups: Sequence[_Group], ignored: Sequence[str]) -> None:
        self._groups = groups
        # Asked for each product of each expert, and some checkpoints list hundreds.
        self._names = frozenset(each for each in ignored if not each.startswith("re:"))
        self._patterns = [each for each in ignored if each.startswith("re:")]

    def of(self, path: str) -> Format:
        if path in self._names or "Linear" in self._names:
            return DENSE
        if any(_is_named(path, each) for each in self._patterns):
            return DENSE
        # A module's own name counts for more than that of its class.
        for matches in (_is_named, lambda path, target: target == "Linear"):
            for group in self._groups:
                if any(matches(path, each) for each in group.targets):
                    return group.format
        return DENSE


def _is_named(path: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return path == target


def formats(config: Mapping[str, Any]) -> Formats:
    """See :func:`reprise.layers.formats.formats_of`."""
    fields = Fields(config)
    fields.require("quant_method", "compressed-tensors", default="compressed-tensors")
    # Older tools write what the model was in memory, frozen, where they store it compressed.
    # Tensors that are not have other names or dtypes, and are refused when they are loaded.
    fields.require(
        "quantization_status", "compressed", "frozen", default="compressed",
        instead="save the checkpoint compressed (save_compressed=True)",
    )  # fmt: skip
    layout = fields.take("format", "")
    check_cache_scheme(fields)
    fields.nothing("transform_config", "use a checkpoint without transforms of activations")
    sparsity = fields.inside("sparsity_config")
    if sparsity is not None:
        sparsity.require("format", "dense", default="dense", instead="use a dense checkpoint")
    ignored = fields.names("ignore")
    fields.leave("global_compression_ratio", "version")
    groups = fields.inside("config_groups")
    found = [] if groups is None else [_group(groups, each, layout) for each in groups.names_left]
    fields.end()
    for each in [*ignored, *(target for group in found for target in group.targets)]:
        _check_pattern(fields, each)
    return _Formats(found, ignored)


def _check_pattern(fields: Fields, target: str) -> None:
    if target.startswith("re:"):
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise fields.refused(f"{target!r} is no regular expression: {error}") from error


def _group(groups: Fields, name: str, layout: Any) -> _Group:
    group = groups.inside(name)
    assert group is not None
    targets = group.names("targets")
    weights, activations = group.inside("weights"), group.inside("input_activations")
    group.nothing("output_activations", "outputs are not quantised here")
    layout = group.take("format", layout)
    group.end()
    if weights is None:
        raise group.refused("weights is missing: activations alone are not quantised")
    format = _format(weights, activations, layout)
    weights.end()
    if activations is not None:
        activations.end()
    return _Group(targets, format)


def _format(weights: Fields, activations: Fields | None, layout: Any) -> Format:
    kind, bits = weights.take("type", "int"), weights.take("num_bits", 8)
    weights.require("dynamic", False, default=False)
    weights.require(
        "actorder", "weight", "static", False, default=False,
        instead="use a checkpoint that was made with actorder='weight' or none",
    )  # fmt: skip
    weights.leave("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    if (kind, bits) == ("float", 8):
        return _eight_bits(weights, activations, layout)
    if (kind, bits) == ("int", 4):
        return _four_bits(weights, activations, layout)
    raise weights.refused(
        f"type={kind!r}, num_bits={bits!r} is not supported; supported: float of 8 bits, int of 4"
    )


def _eight_bits(weights: Fields, activations: Fields | None, layout: Any) -> Format:
    if layout not in ("float-quantized", "naive-quantized", ""):
        raise weights.refused(f"format={layout!r} is not supported; supported: 'float-quantized'")
    weights.require("symmetric", True, default=True)
    strategy = weights.require("strategy", "tensor", "channel", "block", default="tensor")
    block = weights.take("block_structure")
    weights.leave("group_size")
    if activations is None:
        raise weights.refused(
            "weights of eight bits and no input_activations is not supported; use a checkpoint "
            "whose activations are quantised as they come"
        )
    activations.require("type", "float", default="int")
    activations.require("num_bits", 8, default=8)
    activations.require("symmetric", True, default=True)
    activations.require(
        "dynamic", True, default=False,
        instead="use a checkpoint whose activations are quantised as they come",
    )  # fmt: skip
    activations.leave("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure")
    activations.require("actorder", False, default=False)
    if strategy != "block":
        activations.require("strategy", "token", default="tensor", instead="a scale for each token")
        activations.leave("group_size")
        return Channels(_SCALE, whole=strategy == "tensor")
    sizes = isinstance(block, list) and all(type(each) is int and each > 0 for each in block)
    if not sizes or len(block) != 2:
        raise weights.refused(f"block_structure={block!r} must be two whole numbers of at least 1")
    activations.require("strategy", "group", default="tensor")
    activations.require("group_size", block[1], default=None, instead="groups as wide as blocks")
    return Blocks(_SCALE, *block)


def _four_bits(weights: Fields, activations: Fields | None, layout: Any) -> Format:
    if layout not in ("pack-quantized", ""):
        raise weights.refused(f"format={layout!r} is not supported; supported: 'pack-quantized'")
    if activations is not None:
        raise weights.refused(
            "input_activations beside weights of four bits is not supported; use a checkpoint "
            "whose weights alone are quantised (W4A16)"
        )
    symmetric = weights.require("symmetric", True, False, default=True)
    strategy = weights.require("strategy", "group", "channel", default="group")
    group = weights.take("group_size")
    weights.leave("block_structure")
    if strategy == "channel":
        return PackedInts(None, zeros=not symmetric)
    if type(group) is not int or group < 8 or group % 8:
        raise weights.refused(f"group_size={group!r} must be a multiple of 8")
    return PackedInts(group, zeros=not symmetric)
