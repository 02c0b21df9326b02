"""``quant_method`` fp8: DeepSeek-V3's blocks of 128 by 128, as transformers writes them too
(``FineGrainedFP8Config``), and AutoFP8's one scale a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise.layers.formats.base import Formats
from reprise.layers.formats.eight_bits import Blocks, Channels, EightBits
from reprise.layers.formats.fields import AllBut, Fields, check_cache_scheme, is_head, is_within
from reprise.layers.formats.powers import Mxfp4, PowerBlocks, PowersOfTwo

_DYNAMIC = "use a checkpoint whose activations are quantised as they come"


def formats(config: Mapping[str, Any]) -> Formats:
    """See :func:`reprise.layers.formats.formats_of`."""
    fields = Fields(config)
    fields.require("quant_method", "fp8", default="fp8")
    fields.require("activation_scheme", "dynamic", default="dynamic", instead=_DYNAMIC)
    fields.require("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    scales = fields.require("scale_fmt", "float", "ue8m0", default="float")
    powers = scales == "ue8m0"
    # Before that field was there, checkpoints whose scales are powers of two had experts of four
    # bits. A checkpoint that has others does not fit and is refused when it is loaded.
    experts = fields.require(
        "expert_dtype",
        *(("fp4", "fp8") if powers else ("fp8",)),
        default="fp4" if powers else "fp8",
    )
    fields.require("dequantize", False, default=False)
    fields.require("is_checkpoint_fp8_serialized", True, default=True)
    fields.nothing("modules_to_convert", "products alone have eight bits here")
    check_cache_scheme(fields)
    plain = fields.names("modules_to_not_convert", "ignored_layers")
    format = _format(fields)
    fields.end()
    if powers:
        return _powers(fields, format, experts, plain)
    return AllBut(format, lambda path: is_head(path) or is_within(path, plain))


def _powers(fields: Fields, format: EightBits, experts: str, plain: list[str]) -> Formats:
    """The formats of DeepSeek-V4."""
    if not isinstance(format, Blocks):
        raise fields.refused("scale_fmt='ue8m0' without weight_block_size is not supported")
    blocks = PowerBlocks("scale", format.block_n, format.block_k)
    return PowersOfTwo(blocks, blocks if experts == "fp8" else Mxfp4("scale"), plain)


def _format(fields: Fields) -> EightBits:
    block = fields.take("weight_block_size")
    if block is None:
        return Channels("weight_scale", whole=True)
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise fields.refused(f"weight_block_size={block!r} must be two whole numbers")
    if not all(type(each) is int and each > 0 for each in block):
        raise fields.refused(f"weight_block_size={block!r} must be two whole numbers of at least 1")
    return Blocks("weight_scale_inv", *block)
