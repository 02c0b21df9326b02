"""The ops that models are made of, one folder each: reference, cases, Triton, vendors' versions.

Every folder in here is declared when this package is imported; what is listed can be called as
``ops.NAME``.
"""

import importlib
import pkgutil

from reprise.ops.all_gather import all_gather as all_gather
from reprise.ops.all_reduce import all_reduce as all_reduce
from reprise.ops.all_reduce import all_reduce_add as all_reduce_add
from reprise.ops.all_reduce import all_reduce_add_norm as all_reduce_add_norm
from reprise.ops.apply_bitmask import apply_bitmask as apply_bitmask
from reprise.ops.apply_penalties import apply_penalties as apply_penalties
from reprise.ops.argmax import argmax as argmax
from reprise.ops.causal_conv import causal_conv as causal_conv
from reprise.ops.checksum import checksum as checksum
from reprise.ops.compressor import compressor as compressor
from reprise.ops.dispatch import combine as combine
from reprise.ops.dispatch import dispatch as dispatch
from reprise.ops.draft_inputs import draft_inputs as draft_inputs
from reprise.ops.expert_load import expert_load as expert_load
from reprise.ops.experts import experts as experts
from reprise.ops.experts import experts_add as experts_add
from reprise.ops.fp8_experts import fp8_experts as fp8_experts
from reprise.ops.fp8_linear import fp8_linear as fp8_linear
from reprise.ops.fp8_linear import fp8_linear_add as fp8_linear_add
from reprise.ops.fp8_linear import fp8_norm_gated_linear as fp8_norm_gated_linear
from reprise.ops.fp8_linear import fp8_norm_linear as fp8_norm_linear
from reprise.ops.fp8_rotated_output import fp8_rotated_output as fp8_rotated_output
from reprise.ops.gated_delta import gated_delta as gated_delta
from reprise.ops.gated_rms_norm import gated_rms_norm as gated_rms_norm
from reprise.ops.grouped_output import grouped_output as grouped_output
from reprise.ops.hyper_connection import hyper_connection as hyper_connection
from reprise.ops.hyper_head import hyper_head as hyper_head
from reprise.ops.indexer import indexer as indexer
from reprise.ops.kv_insert import kv_insert as kv_insert
from reprise.ops.linear import gated_linear as gated_linear
from reprise.ops.linear import linear as linear
from reprise.ops.linear import linear_add as linear_add
from reprise.ops.linear import linear_into as linear_into
from reprise.ops.linear import norm_gated_linear as norm_gated_linear
from reprise.ops.linear import norm_linear as norm_linear
from reprise.ops.masked_argmax import masked_argmax as masked_argmax
from reprise.ops.mxfp4_experts import mxfp4_experts as mxfp4_experts
from reprise.ops.ngram import ngram as ngram
from reprise.ops.paged_attention import paged_attention as paged_attention
from reprise.ops.put_off import together as together
from reprise.ops.registry import Op as Op
from reprise.ops.registry import OpTable as OpTable
from reprise.ops.registry import all_ops as all_ops
from reprise.ops.registry import find as find
from reprise.ops.registry import needs_triton as needs_triton
from reprise.ops.registry import op as op
from reprise.ops.registry import runs_anywhere as runs_anywhere
from reprise.ops.rms_norm import rms_norm as rms_norm
from reprise.ops.rotary_cache import rotary_cache as rotary_cache
from reprise.ops.rotary_tail import rotary_tail as rotary_tail
from reprise.ops.route import route as route
from reprise.ops.sample import sample as sample
from reprise.ops.sigmoid_and_mul import sigmoid_and_mul as sigmoid_and_mul
from reprise.ops.silu_and_mul import silu_and_mul as silu_and_mul
from reprise.ops.sparse_attention import sparse_attention as sparse_attention
from reprise.ops.step import advance as advance
from reprise.ops.step import lay_out as lay_out
from reprise.ops.swiglu_clamp import swiglu_clamp as swiglu_clamp
from reprise.ops.w4_linear import w4_linear as w4_linear
from reprise.ops.w4_linear import w4_linear_add as w4_linear_add
from reprise.ops.w4_linear import w4_norm_gated_linear as w4_norm_gated_linear
from reprise.ops.w4_linear import w4_norm_linear as w4_norm_linear
from reprise.ops.wide_linear import wide_linear as wide_linear

for _folder in pkgutil.iter_modules(__path__):
    if _folder.ispkg:
        importlib.import_module(f"{__name__}.{_folder.name}")
