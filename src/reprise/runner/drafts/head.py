"""What drafts from the target's own hidden states, as a draft model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from reprise.cache import Batch
from reprise.models.deepseek_v4 import NextStreams
from reprise.models.eagle3 import Eagle3
from reprise.models.mtp import NextTokens
from reprise.runner.drafts.draft_model import DraftModel


class HeadModel(DraftModel):
    """An EAGLE-3 head, or a layer of the target's for further tokens.

    Args:
        head: The head or layer.
        reload: Fills its parameters again.
        waits: As of :class:`DraftModel`.
    """

    shifted = True

    def __init__(
        self,
        head: Eagle3 | NextTokens | NextStreams,
        reload: Callable[[], None],
        *,
        waits: bool = False,
    ) -> None:
        super().__init__()
        self.waits = waits
        self.head = head
        self.taps = head.taps
        self.hidden_size, self.vocab_size = head.hidden_size, head.vocab_size
        self.reload = reload

    def prepare(self, taps: Tensor) -> Tensor:
        return self.head.prepare(taps)

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        assert hidden is not None, "a shifted model goes on from hidden states"
        out: Tensor = self.head(batch, hidden)
        return out

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        return self.head.logits(hidden, out)

    def token_ids(self, drafts: Tensor) -> Tensor:
        return self.head.token_ids(drafts)
