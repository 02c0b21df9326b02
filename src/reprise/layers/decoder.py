"""The pre-norm decoder that the Llama family and its descendants share."""

from __future__ import annotations

from torch import Tensor, nn

from reprise.cache import Batch
from reprise.layers.embedding import Embedding
from reprise.layers.lazy import Normed, add
from reprise.layers.norm import RMSNorm


class DecoderLayer(nn.Module):
    """Attention, then feed-forward: each reads the normalised residual stream and adds to it.

    Both may be any module that is called with such a :class:`Normed` and the batch, and gives a
    tensor or a :class:`reprise.layers.Product`.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        input_norm: RMSNorm,
        post_attention_norm: RMSNorm,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_norm
        self.post_attention_layernorm = post_attention_norm

    def forward(self, residual: Tensor, batch: Batch) -> None:
        """residual: [T, D], updated in place."""
        add(residual, self.self_attn(Normed(residual, self.input_layernorm), batch))
        add(residual, self.mlp(Normed(residual, self.post_attention_layernorm), batch))


class Decoder(nn.Module):
    """Embedding, layers, final norm. Parameter names are those of the checkpoints."""

    def __init__(self, embedding: Embedding, layers: list[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self._layers = layers
        self.norm = norm

    def forward(self, batch: Batch) -> Tensor:
        """Normalised hidden states [T, D]."""
        residual = self.embed_tokens(batch.token_ids)
        for layer in self._layers:
            layer(residual, batch)
        return self.norm(residual)
