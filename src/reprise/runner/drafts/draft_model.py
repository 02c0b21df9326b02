"""Models that draft tokens, as the drafter runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from reprise.cache import Batch, LayerCache
from reprise.cache.spec import State, caches_of
from reprise.layers import CausalLM, Depth
from reprise.speculation import Speculation


class DraftModel(nn.Module):
    """Drafts tokens one after the other. Its layers keep their rows in caches of its own over the
    block tables of the target.

    A shifted model (EAGLE, a target's own layers for further tokens) takes in row i the hidden
    state of token i and the id of token i + 1, at position i, and predicts token i + 2. Any other
    takes token i at position i, as the target does.
    """

    taps: tuple[Depth, ...] = ()
    """Depths of the target whose hidden states it takes, side by side."""
    shifted: bool
    waits: bool = False
    """Its passes have collectives: other ranks compute parts of them."""
    keeps_states = False
    """Some layers keep recurrent states."""
    hidden_size: int
    """D, of what :meth:`forward` gives."""
    vocab_size: int
    """Of :meth:`logits`; it may be smaller than the target's."""
    reload: Callable[[], None]
    """Fills the parameters with what they were loaded with."""

    def lookahead(self, count: int, width: int) -> int:
        """Places that it needs in the caches behind those of the ``width`` tokens that a step
        verifies beside the newest one, to draft ``count`` tokens wherever these end."""
        return max(0, count + count - self.shifted - width)

    def prepare(self, taps: Tensor) -> Tensor:
        """[T, N * H], the target's hidden states, as [T, D]."""
        return taps

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Hidden states [T, D], for :meth:`logits` and for its own next pass; writes its caches.

        Args:
            batch: Ids are those that the rows take.
            hidden: [T, D], of :meth:`prepare` or of its last pass; None if it is not shifted.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[R, D] to [R, vocab_size] in the compute dtype, in ``out``."""
        raise NotImplementedError

    def token_ids(self, drafts: Tensor) -> Tensor:
        """Ids of its vocabulary as the target's, [R] int64. They ascend: then a token that is drawn
        from either vocabulary with the same number is the same one."""
        return drafts

    def caches(self) -> dict[str, LayerCache]:
        """What its layers keep from step to step, by name."""
        return caches_of(self)


def caches_with(target: CausalLM, draft: DraftModel | None) -> dict[str, LayerCache]:
    """Of all layers that keep something, by name: the target's and those of what drafts for it."""
    drafts = {} if draft is None else draft.caches()
    return {**target.caches(), **{f"draft {name}": each for name, each in drafts.items()}}


def lookahead_of(draft: DraftModel | None, speculation: Speculation | None) -> int:
    """See :meth:`DraftModel.lookahead`; 0 where no model drafts."""
    if draft is None or speculation is None:
        return 0
    return draft.lookahead(speculation.num_tokens, speculation.width)


class IndependentModel(DraftModel):
    """A language model of the target's vocabulary.

    Args:
        model: The language model.
        reload: Fills its parameters again.
    """

    shifted = False

    def __init__(self, model: CausalLM, reload: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        for each in model.caches().values():
            if isinstance(each.lifetime, State):
                each.lifetime = replace(each.lifetime, rows=2)
                self.keeps_states = True
        self.hidden_size, self.vocab_size = model.hidden_size, model.vocab_size
        self.reload = reload

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        out: Tensor = self.model(batch)
        return out

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        return self.model.logits(hidden, out)
