"""Building blocks that models share. They call ops; they know no device and no request."""

from reprise.layers.attention import SelfAttention
from reprise.layers.build import Build
from reprise.layers.causal_lm import CausalLM, routes
from reprise.layers.compressed_attention import AttentionSizes, CompressedAttention
from reprise.layers.decoder import Decoder, DecoderLayer, Depth, Taps
from reprise.layers.destination import Destination, Implied, Place
from reprise.layers.embedding import Embedding
from reprise.layers.experts import Experts
from reprise.layers.gated_delta import GatedDeltaNet
from reprise.layers.head import Head
from reprise.layers.hyper_connection import (
    HyperConnection,
    HyperHead,
    Mixing,
    Streams,
    wide_norm,
)
from reprise.layers.lazy import Normed, Product, Residual, tensor
from reprise.layers.linear import Linear, Run
from reprise.layers.mlp import GatedMLP
from reprise.layers.norm import CentredRMSNorm, RMSNorm
from reprise.layers.rotary import (
    context_length,
    default_length,
    describe_rotary,
    identity_table,
    parameters_of,
    rotary_table,
)
from reprise.layers.scored_experts import ScoredMLP
from reprise.layers.sparse_mlp import Routing, SparseMLP
from reprise.layers.stack import Stack
from reprise.layers.stored_model import StoredModel

__all__ = [
    "AttentionSizes",
    "Build",
    "CausalLM",
    "CentredRMSNorm",
    "CompressedAttention",
    "Decoder",
    "DecoderLayer",
    "Depth",
    "Destination",
    "Embedding",
    "Experts",
    "GatedDeltaNet",
    "GatedMLP",
    "Head",
    "HyperConnection",
    "HyperHead",
    "Implied",
    "Linear",
    "Mixing",
    "Normed",
    "Place",
    "Product",
    "RMSNorm",
    "Residual",
    "Routing",
    "Run",
    "ScoredMLP",
    "SelfAttention",
    "SparseMLP",
    "Stack",
    "StoredModel",
    "Streams",
    "Taps",
    "context_length",
    "default_length",
    "describe_rotary",
    "identity_table",
    "parameters_of",
    "rotary_table",
    "routes",
    "tensor",
    "wide_norm",
]
