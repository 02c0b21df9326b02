"""EAGLE-3 (Li et al. 2025): a decoder layer that drafts from hidden states of a target model.

Row i takes what the target computed at position i, at a few depths, and the embedding of token
i + 1, and predicts token i + 2. Behind the newest token it goes on from its own output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from reprise.cache import Batch
from reprise.layers import (
    Build,
    CausalLM,
    DecoderLayer,
    Destination,
    Embedding,
    GatedMLP,
    Head,
    Linear,
    Normed,
    Residual,
    RMSNorm,
    SelfAttention,
    StoredModel,
    rotary_table,
)
from reprise.models.config_reader import (
    Config,
    flag,
    head_size,
    norm_eps,
    require,
    require_sizes,
    rope_parameters,
)

RENAMES = {"midlayer.": "layers.0.", "model.midlayer.": "layers.0.", "model.": ""}


@dataclass(frozen=True)
class HeadConfig:
    """What a head is, whichever tool wrote its checkpoint."""

    layers: Config
    """transformers' config of its layers: sizes, RoPE, epsilon."""
    taps: tuple[int, ...]
    """Depths whose hidden states it reads, see :data:`reprise.layers.Depth`; ascending."""
    draft_vocab_size: int
    """Vd: tokens that it can draft."""
    input_norm: Literal["none", "each", "joint"] = "none"
    """Whether those states are normalised, each alone or all as one, before they are projected."""
    norm_before_residual: bool = False
    """The first layer's residual stream begins with the normalised states."""
    norm_output: bool = False
    """The next pass takes the output behind the last norm."""
    qk_norm: bool = False
    embedding: Literal["own", "target's"] = "target's"
    head: Literal["own", "target's", "embedding"] = "own"
    """The last product: of its own weight, the target's, or the embedding's."""
    mapped: bool = True
    """Its tokens have other numbers than the target's, which the checkpoint tells (``d2t``)."""


class FirstLayer(nn.Module):
    """A decoder layer whose attention reads an embedding beside the residual stream."""

    def __init__(
        self,
        attention: SelfAttention,
        mlp: GatedMLP,
        input_norm: RMSNorm,
        hidden_norm: RMSNorm,
        post_attention_norm: RMSNorm,
        *,
        norm_before_residual: bool,
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = input_norm
        self.hidden_norm = hidden_norm
        self.post_attention_layernorm = post_attention_norm
        self.norm_before_residual = norm_before_residual

    def forward(self, embedded: Tensor, hidden: Tensor, batch: Batch) -> Residual:
        """embedded, hidden: [T, D], not changed. Returns the residual stream, of [T, D]."""
        normed = self.hidden_norm(hidden)
        read = torch.cat((self.input_layernorm(embedded), normed), -1)
        # What is added to must not be another's: `hidden` is read again, `normed` was copied.
        residual = Residual(normed if self.norm_before_residual else hidden.clone())
        residual.add(self.self_attn(read, batch))
        residual.add(self.mlp(residual.normed(self.post_attention_layernorm), batch))
        return residual


class DraftVocabulary(nn.Module):
    """The target's number of each token of the head: [Vd] int64.

    Checkpoints have the distance of each from its own number (``d2t``), and which tokens of the
    target the head knows (``t2d``), which follows.
    """

    def __init__(self, size: int, device: torch.device, *, mapped: bool) -> None:
        super().__init__()
        self.target_ids = torch.arange(size, device=device)
        self.mapped = mapped

    def destinations(self) -> Iterator[tuple[str, Destination | None]]:
        place = Destination(self.target_ids, convert=_from_distances, optional=not self.mapped)
        yield "d2t", place
        yield "t2d", None


def _from_distances(stored: Tensor) -> Tensor:
    return stored + torch.arange(len(stored), device=stored.device)


class Eagle3(StoredModel):
    """The head.

    Args:
        config: What it is.
        build: How to make it: as the target, with the target's longest context.
        target: Whose hidden states it reads, and whose embedding and head it may use.

    Raises:
        ModelError: The config asks for something that is not computed here.
    """

    def __init__(self, config: HeadConfig, build: Build, target: CausalLM) -> None:
        super().__init__(RENAMES)
        layers = config.layers
        require(layers, hidden_act="silu")
        require_sizes(layers)
        hidden, eps, size = layers.hidden_size, norm_eps(layers), head_size(layers)
        self.taps = config.taps
        self.hidden_size = hidden
        self.vocab_size = config.draft_vocab_size
        self.config = config
        self._tap_size = target.hidden_size
        cos_sin = rotary_table(
            rope_parameters(layers),
            head_size=size,
            max_position_embeddings=layers.max_position_embeddings,
            length=build.max_model_len,
            device=build.device,
        )
        attention_bias = flag(layers, "attention_bias")
        mlp_bias = hasattr(layers, "mlp_bias") and flag(layers, "mlp_bias")

        def norm(width: int = hidden) -> RMSNorm:
            return RMSNorm(build, width, eps)

        def attention(index: int) -> SelfAttention:
            return SelfAttention(
                build.at(f"layers.{index}.self_attn"),
                hidden,
                layers.num_attention_heads,
                layers.num_key_value_heads,
                size,
                cos_sin,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
                qk_norm_eps=eps if config.qk_norm else None,
                input_size=None if index else 2 * hidden,
            )

        def mlp(index: int) -> GatedMLP:
            here = build.at(f"layers.{index}.mlp")
            return GatedMLP(here, hidden, layers.intermediate_size, bias=mlp_bias)

        first = FirstLayer(
            attention(0), mlp(0), norm(), norm(), norm(),
            norm_before_residual=config.norm_before_residual,
        )  # fmt: skip
        further = [
            DecoderLayer(attention(index), mlp(index), norm(), norm())
            for index in range(1, layers.num_hidden_layers)
        ]
        self._layers = first, further
        self.layers = nn.ModuleList([first, *further])
        self.norm = norm()
        width = len(self.taps) * self._tap_size
        if config.input_norm == "each":
            self.fc_norm = nn.ModuleList(norm(self._tap_size) for _ in self.taps)
        elif config.input_norm == "joint":
            self.input_norm = norm(width)
        self.fc = Linear(build.at("fc"), width, hidden)
        self.vocabulary = DraftVocabulary(self.vocab_size, build.device, mapped=config.mapped)
        # A tuple hides modules of the target from the walk over this one's own.
        self._embedding: tuple[Embedding] = (target.model.embed_tokens,)
        if config.embedding == "own":
            self.embed_tokens = Embedding(build, layers.vocab_size, hidden)
            self._embedding = (self.embed_tokens,)
        self._head: tuple[Head] = (target.lm_head,)
        if config.head != "target's":
            tensors = self._embedding[0].tensors if config.head == "embedding" else None
            head = Head(build.at("lm_head"), hidden, self.vocab_size, tensors)
            self._head = (head,)
            if config.head == "own":
                self.lm_head = head

    def prepare(self, taps: Tensor) -> Tensor:
        """Hidden states of the target [T, n * H], those of each depth beside the one before, to
        what the head reads of them [T, D]."""
        if self.config.input_norm == "each":
            parts = taps.split(self._tap_size, -1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            return self.fc(torch.cat(normed, -1))
        return self.fc(Normed(taps, self.input_norm) if self.config.input_norm == "joint" else taps)

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Compute one pass.

        Args:
            batch: Of which ``token_ids`` are the tokens behind the rows'.
            hidden: [T, D], what :meth:`prepare` gave for the rows, or what this gave for the rows
                before them; not changed.

        Returns:
            [T, D], of which :meth:`logits` are and from which the next pass goes on.
        """
        first, further = self._layers
        residual = first(self._embedding[0](batch.token_ids), hidden, batch)
        for layer in further:
            layer(residual, batch)
        values = residual.values
        return self.norm(values) if self.config.norm_output else values

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[R, D] to [R, Vd], in ``out``."""
        self._head[0].into(hidden if self.config.norm_output else self.norm(hidden), out)
        return out

    def token_ids(self, drafts: Tensor) -> Tensor:
        """[...] int64, the head's numbers of tokens, to the target's."""
        return self.vocabulary.target_ids[drafts]

    def share_embedding(self, target: CausalLM) -> None:
        """Give up its own embedding for the target's, if both are the same."""
        own, other = self._embedding[0].weight, target.model.embed_tokens.weight
        if own is other or own.shape != other.shape or not torch.equal(own, other):
            return
        del self.embed_tokens
        # Loading the weights again finds it in the checkpoint.
        self.others = ("embed_tokens.weight",)
        self._embedding = (target.model.embed_tokens,)
