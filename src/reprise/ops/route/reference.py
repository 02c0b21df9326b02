import torch
from torch import Tensor

from reprise.ops.lanes import sigmoid, softplus

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
TINY = 1e-20
"""Keeps a sum of scores that are all 0 from dividing by 0."""


def reference(
    logits: Tensor,
    live: Tensor,
    weights: Tensor,
    ids: Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
    bias: Tensor | None,
    chosen: Tensor | None,
) -> None:
    """Choose K of E experts for each row, and their weights in the row's sum.

    The experts of the K largest scores, largest first; of equal scores the one with the lower
    number, and of a row with NaN those first. (``torch.topk``, which transformers calls, leaves
    the order of equal scores open.) Softmax over all experts before the choice, as in Qwen3-MoE and
    Mixtral; sigmoid and a bias that decides about the choice alone, as in DeepSeek-V3 (2024, eq.
    13-16); the root of softplus, and a choice that a table of tokens makes, as in DeepSeek-V4.

    Args:
        logits: [T, E]; its rows may be strided.
        live: [1] int32: rows from here on are padding. Theirs are no experts: -1, of weight 0.
        weights: [T, K] float32, written.
        ids: [T, K] int32, written.
        scoring: What makes scores of logits, one of :data:`SCORINGS`.
        renormalize: Divide the weights of a row by their sum.
        scale: Factor of the weights behind that.
        bias: [E] float32, added to scores for the choice alone; or None.
        chosen: [T, K], the experts of each row, which are not to be chosen any more; or None.

    Raises:
        ValueError: ``scoring`` is none of these.
    """
    wide = logits.float()
    if scoring == "softmax":
        scores = wide.softmax(dim=-1)
    elif scoring == "sigmoid":
        scores = sigmoid(wide)
    elif scoring == "sqrtsoftplus":
        scores = softplus(wide).sqrt()
    else:
        raise ValueError(f"scoring={scoring!r} must be one of {', '.join(SCORINGS)}")
    if chosen is None:
        # Logits are in the order of scores, and no two implementations round them differently.
        keys = wide if bias is None else scores + bias
        keys = torch.where(keys.isnan(), torch.inf, keys)
        order = keys.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, : ids.shape[1]]
    found = scores.gather(1, chosen.long())
    if renormalize:
        found = found / (found.sum(dim=-1, keepdim=True) + TINY)
    real = (torch.arange(len(ids), device=ids.device) < live).unsqueeze(1)
    weights.copy_(torch.where(real, found * scale, 0.0))
    ids.copy_(torch.where(real, chosen, -1))
