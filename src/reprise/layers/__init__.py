"""Building blocks that models share. They call ops; they know no device and no request."""

from reprise.layers.attention import SelfAttention
from reprise.layers.build import Build
from reprise.layers.decoder import CausalLM, Decoder, DecoderLayer
from reprise.layers.embedding import Embedding
from reprise.layers.linear import Linear, MergedLinear
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import RMSNorm
from reprise.layers.rotary import (
    context_length,
    default_length,
    describe_rotary,
    identity_table,
    parameters_of,
    rotary_table,
)

__all__ = [
    "Build",
    "CausalLM",
    "Decoder",
    "DecoderLayer",
    "Embedding",
    "GatedMLP",
    "Linear",
    "MergedLinear",
    "RMSNorm",
    "SelfAttention",
    "context_length",
    "default_length",
    "describe_rotary",
    "identity_table",
    "parameters_of",
    "rotary_table",
]
