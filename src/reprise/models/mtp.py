"""The layer of a hybrid that drafts further tokens: multi-token prediction, as Qwen trains it.

Row i takes the target's hidden state behind its last norm at position i, and the embedding of
token i + 1, and predicts token i + 2. Behind the newest token it goes on from its own output. The
embedding and the last product are the target's, whose checkpoint has the layer as ``mtp.``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from reprise.cache import Batch
from reprise.errors import ModelError
from reprise.layers import (
    Build,
    CausalLM,
    CentredRMSNorm,
    Depth,
    Linear,
    Residual,
    SelfAttention,
    StoredModel,
    tensor,
)
from reprise.layers.formats import PLAIN
from reprise.models.config_reader import Config, norm_eps, require, whole_number
from reprise.models.hybrid import FULL, MLP, layer_maker

PREFIX = "mtp."
_COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Fields that may say how many layers there are; Qwen3-Next's configs have neither."""
_TARGETS = ("model.", "lm_head.", "language_model.", "visual.")
"""What the checkpoint has beside."""


class NextTokens(StoredModel):
    """The layer, as what drafts.

    Args:
        config: The target's.
        build: How to make it: as the target.
        target: Whose hidden states it reads, and whose embedding and last product it uses.
        mlp: As of :func:`reprise.models.hybrid.build_hybrid`.

    Raises:
        ModelError: The config asks for something that is not computed here.
    """

    taps: tuple[Depth, ...] = ("final",)

    def __init__(
        self, config: Config, build: Build, target: CausalLM, mlp: MLP | None = None
    ) -> None:
        super().__init__(others=_TARGETS)
        _require_one_layer(config)
        self.hidden_size, self.vocab_size = target.hidden_size, target.vocab_size
        attention = (each for each in target.modules() if isinstance(each, SelfAttention))
        cos_sin = next((each.cos_sin for each in attention), None)
        self.mtp = _Layer(config, build.at("mtp"), mlp, cos_sin)
        # A tuple hides modules of the target from the walk over this one's own.
        self._target = (target.model.embed_tokens, target.lm_head)

    def prepare(self, taps: Tensor) -> Tensor:
        """The target's hidden states [T, D], as they are."""
        return taps

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Compute one pass.

        Args:
            batch: Of which ``token_ids`` are the tokens behind the rows'.
            hidden: [T, D], the target's behind its last norm, or what this gave for the rows before
                them; not changed.

        Returns:
            [T, D], of which :meth:`logits` are and from which the next pass goes on.
        """
        out: Tensor = self.mtp(self._target[0](batch.token_ids), hidden, batch)
        return out

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[R, D] to [R, V], in ``out``."""
        self._target[1].into(hidden, out)
        return out

    def token_ids(self, drafts: Tensor) -> Tensor:
        """The drafts themselves: the tokens are the target's."""
        return drafts


class _Layer(nn.Module):
    """Names are those of checkpoints."""

    def __init__(
        self, config: Config, build: Build, mlp: MLP | None, cos_sin: Tensor | None
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, norm_eps(config)
        make = layer_maker(config, build, mlp=mlp, cos_sin=cos_sin)
        self.pre_fc_norm_embedding = CentredRMSNorm(build.at("pre_fc_norm_embedding"), hidden, eps)
        self.pre_fc_norm_hidden = CentredRMSNorm(build.at("pre_fc_norm_hidden"), hidden, eps)
        # Plain in every checkpoint, whether or not it is among those left out of quantisation.
        self.fc = Linear(replace(build.at("fc"), formats=PLAIN), 2 * hidden, hidden)
        self.layers = nn.ModuleList([make(build.at("layers.0"), 0, FULL)])
        self.norm = CentredRMSNorm(build.at("norm"), hidden, eps)

    def forward(self, embedded: Tensor, hidden: Tensor, batch: Batch) -> Tensor:
        """embedded, hidden: [T, D], not changed. Returns [T, D]."""
        parts = self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)
        residual = Residual(self.fc(torch.cat(parts, -1)))
        for layer in self.layers:
            layer(residual, batch)
        return tensor(residual.normed(self.norm))


def _require_one_layer(config: Config) -> None:
    require(config, mtp_use_dedicated_embeddings=False)
    for name in _COUNTS:
        if getattr(config, name, None) is not None and whole_number(config, name) != 1:
            raise ModelError(
                f"config field {name}={getattr(config, name)!r}: one layer that drafts further "
                "tokens is supported, which is used as often as tokens are drafted"
            )
