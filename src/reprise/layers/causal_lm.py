from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reprise.cache import Batch
from reprise.layers.build import Build
from reprise.layers.decoder import Body, Taps
from reprise.layers.head import Head
from reprise.layers.stored_model import StoredModel


class CausalLM(StoredModel):
    """A decoder with a language-model head: what every architecture file returns.

    Args:
        build: How to make the head.
        decoder: Gives the hidden states.
        vocab_size: Of the embedding and the head.
        hidden_size: Width of the hidden states.
        tie_word_embeddings: The head's weight is the embedding's.
        renames: See :class:`StoredModel`.
        others: See :class:`StoredModel`.
    """

    def __init__(
        self,
        build: Build,
        decoder: Body,
        vocab_size: int,
        hidden_size: int,
        *,
        tie_word_embeddings: bool,
        renames: Mapping[str, str] | None = None,
        others: tuple[str, ...] = (),
    ) -> None:
        super().__init__(renames, others)
        self._build = build.at("lm_head")
        self.model = decoder
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.tied = tie_word_embeddings
        """The head's weight is the embedding's."""
        self.lm_head = self._head(decoder.embed_tokens.tensors if self.tied else None)

    def untie(self, name: str, weight: Tensor) -> bool:
        """The head can have a weight of its own, [vocab_size, hidden_size]."""
        if name != f"{self.lm_head.path}.weight":
            return False
        self.tied = False
        self.lm_head = self._head({"weight": weight})
        return True

    def _head(self, tensors: Mapping[str, Tensor] | None) -> Head:
        sizes = self.hidden_size, self.vocab_size
        return Head(self._build, *sizes, tensors)

    def forward(self, batch: Batch, taps: Taps | None = None) -> Tensor:
        """Hidden states [T, hidden_size] of the step's tokens; writes the KV cache, and what
        ``taps`` asks for."""
        return self.model(batch) if taps is None else self.model(batch, taps)

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[R, hidden_size] to [R, vocab_size], in the compute dtype; in ``out`` if it is given.

        One op computes both, so that a row's logits are of the same bits in steps of either kind.
        """
        if out is None:
            out = hidden.new_empty((len(hidden), self.vocab_size))
        self.lm_head.into(hidden, out)
        return out

    @property
    def routed(self) -> bool:
        """Some layer sends rows to experts: it says how, as ``routing``."""
        return routes(self)


def routes(model: nn.Module) -> bool:
    """Some layer of it sends rows to experts: it says how, as ``routing``."""
    return any(getattr(each, "routing", None) is not None for each in model.modules())
