from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reprise.cache import Batch, LayerCache
from reprise.cache.spec import caches_of
from reprise.layers.build import Build
from reprise.layers.decoder import Decoder, Taps
from reprise.layers.linear import Linear


class CausalLM(nn.Module):
    """A decoder with a language-model head: what every architecture file returns.

    Args:
        build: How to make the head.
        decoder: Gives the hidden states.
        vocab_size: Of the embedding and the head.
        hidden_size: Width of the hidden states.
        tie_word_embeddings: The head's weight is the embedding's.
        renames: Prefixes of names that checkpoints may have, to those that this model has.
        others: Prefixes, as this model has them, of what a checkpoint may store beside and nobody
            here computes, such as the part that reads images.
    """

    def __init__(
        self,
        build: Build,
        decoder: Decoder,
        vocab_size: int,
        hidden_size: int,
        *,
        tie_word_embeddings: bool,
        renames: Mapping[str, str] | None = None,
        others: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.renames: Mapping[str, str] = renames or {}
        self.others = others
        self._build = build.at("lm_head")
        self.model = decoder
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.tied = tie_word_embeddings
        """The head's weight is the embedding's."""
        self.lm_head = self._head(decoder.embed_tokens.tensors if self.tied else None)

    def untie(self, weight: Tensor) -> None:
        """Give the head a weight of its own, [vocab_size, hidden_size]."""
        self.tied = False
        self.lm_head = self._head({"weight": weight})

    def _head(self, tensors: Mapping[str, Tensor] | None) -> Linear:
        sizes = self.hidden_size, self.vocab_size
        return Linear(self._build, *sizes, split="out", tensors=tensors)

    def forward(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Hidden states [T, hidden_size] of the step's tokens; writes the KV cache, and what
        ``taps`` asks for."""
        return self.model(batch) if taps is None else self.model(batch, taps)

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, hidden_size] to [R, vocab_size], in the compute dtype; in ``out`` if it is given."""
        if out is None:
            return self.lm_head(hidden)
        self.lm_head.into(hidden, out)
        return out

    @property
    def routed(self) -> bool:
        """Some layer sends rows to experts: it says how, as ``routing``."""
        return any(getattr(each, "routing", None) is not None for each in self.modules())

    def caches(self) -> dict[str, LayerCache]:
        """What the layers keep from step to step, in the order in which they were made."""
        return caches_of(self)
