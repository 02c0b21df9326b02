import torch
from torch import Tensor

IN_PROMPT = 1 << 30
"""Added to a token's count if the prompt holds it."""


def reference(
    logits: Tensor,
    rows: Tensor,
    seen: Tensor,
    slots: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    drafted: Tensor,
) -> None:
    """Make tokens that a request has seen less likely, in place.

    First the repetition penalty (Keskar et al. 2019, section 4.1, with the sign rule that is in
    use since): logits of tokens in prompt or output are divided by it where they are positive and
    multiplied where they are not. Then presence and frequency penalties (OpenAI's API reference):
    the one is subtracted once from logits of tokens in the output, the other once for each time.

    Args:
        logits: [R, V] float32.
        rows: [P] int64, the rows to change.
        seen: [S, V] int32, how often each token was generated, plus ``IN_PROMPT`` for tokens of
            the prompt.
        slots: [P] int64, the row of ``seen`` that belongs to each of ``rows``.
        repetition: [P] float32 above 0; 1: none.
        presence: [P] float32; 0: none.
        frequency: [P] float32; 0: none.
        drafted: [P, K] int64, tokens that count as output beside those of ``seen``; -1: none.
    """
    x, known = logits[rows], seen[slots]
    known.scatter_add_(1, drafted.clamp(min=0), (drafted >= 0).to(known.dtype))
    count = known & (IN_PROMPT - 1)
    factor = repetition.unsqueeze(1)
    x = torch.where(known > 0, torch.where(x > 0, x / factor, x * factor), x)
    x -= count * frequency.unsqueeze(1)
    x -= (count > 0) * presence.unsqueeze(1)
    logits.index_copy_(0, rows, x)
