"""``quant_method`` fp8: DeepSeek-V3's blocks of 128 by 128, as transformers writes them too
(``FineGrainedFP8Config``), and AutoFP8's one scale a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise.layers.formats.base import Formats
from reprise.layers.formats.eight_bits import Blocks, Channels, EightBits
from reprise.layers.formats.fields import AllBut, Fields, check_cache_scheme, is_head, is_within

_DYNAMIC = "use a checkpoint whose activations are quantised as they come"


def formats(config: Mapping[str, Any]) -> Formats:
    """See :func:`reprise.layers.formats.formats_of`."""
    fields = Fields(config)
    fields.require("quant_method", "fp8", default="fp8")
    fields.require("activation_scheme", "dynamic", default="dynamic", instead=_DYNAMIC)
    fields.require("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    fields.require("scale_fmt", "float", default="float", instead="scales are any float32 here")
    fields.require("expert_dtype", "fp8", default="fp8")
    fields.require("dequantize", False, default=False)
    fields.require("is_checkpoint_fp8_serialized", True, default=True)
    fields.nothing("modules_to_convert", "products alone have eight bits here")
    check_cache_scheme(fields)
    plain = fields.names("modules_to_not_convert", "ignored_layers")
    format = _format(fields)
    fields.end()
    return AllBut(format, lambda path: is_head(path) or is_within(path, plain))


def _format(fields: Fields) -> EightBits:
    block = fields.take("weight_block_size")
    if block is None:
        return Channels("weight_scale", whole=True)
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise fields.refused(f"weight_block_size={block!r} must be two whole numbers")
    if not all(type(each) is int and each > 0 for each in block):
        raise fields.refused(f"weight_block_size={block!r} must be two whole numbers of at least 1")
    return Blocks("weight_scale_inv", *block)
