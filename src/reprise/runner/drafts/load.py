"""The model that drafts, as ``speculative_config`` names it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reprise import models
from reprise.config import EngineConfig
from reprise.distributed import ALONE, Group
from reprise.errors import ConfigError, LoadError, ModelError, describe
from reprise.layers import Build, CausalLM, StoredModel, routes
from reprise.loading import Checkpoint, load_weights, open_checkpoint, require_method
from reprise.loading.draft_head import build_head, find_head, load_head
from reprise.loading.weight_files import stored_tensors
from reprise.models.mtp import PREFIX
from reprise.platforms import Platform
from reprise.runner.drafts.draft_model import DraftModel, IndependentModel
from reprise.runner.drafts.head import HeadModel
from reprise.runner.model_choices import build_model
from reprise.speculation import Speculation

logger = logging.getLogger(__name__)


def load_draft(
    config: EngineConfig,
    target: CausalLM,
    checkpoint: Checkpoint,
    platform: Platform,
    *,
    max_model_len: int,
    cache_dtype: torch.dtype | None,
    group: Group = ALONE,
    exchange: Group | None = None,
    weights: bool = True,
) -> DraftModel | None:
    """The draft model with its weights; None: no model drafts.

    Args:
        config: Says which.
        target: Whose tokens it drafts.
        checkpoint: The target's.
        platform: The device.
        max_model_len: Longest context of the target. What the draft was trained for does not lower
            it: behind that its drafts count less often.
        cache_dtype: Of the target's keys and values.
        group: The ranks that own the target together, and its own layer.
        exchange: See :class:`reprise.layers.Build`.
        weights: Load them; else sizes alone are wanted.

    Raises:
        ConfigError: The target is none that drafts can be taken back from, or the draft's tokens
            are others.
        ModelError: The draft model is none that can be built.
        LoadError: Its weights do not load.
    """
    asked = config.speculation
    if asked is None:
        return None
    load = _Loading(
        config, asked, target, checkpoint, platform, max_model_len, cache_dtype, group, exchange,
        weights,
    )  # fmt: skip
    if asked.method == "mtp":
        return load.next_tokens()
    if asked.method == "eagle3":
        return load.head()
    return None if asked.model is None else load.model(asked.model)


@dataclass(frozen=True)
class _Loading:
    """See :func:`load_draft`."""

    config: EngineConfig
    asked: Speculation
    target: CausalLM
    checkpoint: Checkpoint
    platform: Platform
    max_model_len: int
    cache_dtype: torch.dtype | None
    group: Group
    exchange: Group | None
    weights: bool

    def model(self, name: str) -> IndependentModel:
        """A language model of its own."""
        named = f"speculative_config: model={name!r}"
        found = open_checkpoint(name, revision=self.asked.revision, config_only=self._config_only)
        require_method(self.asked.quantization, found.config)
        _same_tokens(named, self.checkpoint, found, self.target)
        model = build_model(
            found.config,
            max_model_len=self.max_model_len,
            table_blocks=0,
            dtype=self._dtype,
            cache_dtype=self.cache_dtype,
            num_drafts=self.config.num_drafts,
            platform=self.platform,
        )
        fill = self._filler(model, found.path)
        if self.weights:
            fill()
        return IndependentModel(model, fill)

    def head(self) -> HeadModel:
        """An EAGLE-3 head."""
        config, asked, target, platform = self.config, self.asked, self.target, self.platform
        path = find_head(
            asked.model, self.checkpoint.path, asked.revision, config_only=self._config_only
        )
        if self.weights:
            head = load_head(
                path, target, self._build, platform,
                load_format=config.load_format, seed=config.seed,
            )  # fmt: skip
        else:
            made_up = not any(path.glob("*.safetensors"))
            head = build_head(path, target, self._build, made_up=made_up)
        return HeadModel(head, self._filler(head, path), waits=self._waits(head))

    def next_tokens(self) -> HeadModel:
        """The target's own layer, from its own checkpoint."""
        path = self.checkpoint.path
        head = models.build_mtp(self.checkpoint.config, self._build, self.target)
        fill = self._filler(head, path)
        if self.weights:
            stored = () if self.config.load_format == "dummy" else stored_tensors(path)
            if stored and not any(name.startswith(PREFIX) for name in stored):
                raise LoadError(
                    f"speculative_config: {path} has no tensors of the layer that drafts further "
                    f"tokens ({PREFIX}*), which copies of checkpoints may leave out; take the "
                    "original one, or use 'method': 'ngram'"
                )
            fill()
        return HeadModel(head, fill, waits=self._waits(head))

    def _waits(self, head: StoredModel) -> bool:
        """See :class:`DraftModel`."""
        spread = self.exchange is not None and self.exchange.size > 1
        return self.group.size > 1 or (spread and routes(head))

    @property
    def _config_only(self) -> bool:
        return self.config.load_format == "dummy" or not self.weights

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.target.parameters()).dtype

    @property
    def _build(self) -> Build:
        """How a head is made: as the target."""
        return Build(
            self._dtype, self.platform.device, self.max_model_len, cache_dtype=self.cache_dtype,
            group=self.group, exchange=self.exchange,
        )  # fmt: skip

    def _filler(self, model: StoredModel, path: Path) -> Callable[[], None]:
        """Loads its weights, each time that it is called."""
        config = self.config
        return partial(load_weights, model, path, config.load_format, self.platform, config.seed)


def _same_tokens(named: str, checkpoint: Checkpoint, draft: Checkpoint, target: CausalLM) -> None:
    """Refuse a draft model whose ids stand for other tokens."""
    size = getattr(draft.config, "vocab_size", None)
    if size != target.vocab_size:
        raise ConfigError(
            f"{named} has a vocabulary of {size} tokens and the target one of "
            f"{target.vocab_size}; a draft model must have the target's"
        )
    if draft.path == checkpoint.path:
        return
    ours, theirs = (_vocabulary(each) for each in (checkpoint, draft))
    if ours is None or theirs is None:
        logger.info("%s: whether its tokens are the target's is not known: no tokenizer", named)
        return
    other = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    if other is not None:
        raise ConfigError(
            f"{named}: token {other!r} has the id {theirs.get(other)} there and {ours[other]} in "
            "the target's tokenizer; a draft model must have the target's"
        )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Ids by token; None: it has no tokenizer."""
    try:
        found: dict[str, Any] = checkpoint.tokenizer().get_vocab()
    except (LoadError, ModelError) as error:
        logger.debug("%s", describe(error))
        return None
    return found
