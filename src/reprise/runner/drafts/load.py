"""The model that drafts, as ``speculative_config`` names it."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from reprise import models
from reprise.config import EngineConfig
from reprise.errors import ConfigError, LoadError, ModelError, describe
from reprise.layers import Build, CausalLM
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
        weights: Load them; else sizes alone are wanted.

    Raises:
        ConfigError: The target is none that drafts can be taken back from, or the draft's tokens
            are others.
        ModelError: The draft model is none that can be built.
        LoadError: Its weights do not load.
    """
    asked = config.speculation
    if asked is not None and asked.method in ("eagle3", "mtp"):
        dtype = next(target.parameters()).dtype
        build = Build(dtype, platform.device, max_model_len, cache_dtype=cache_dtype)
        if asked.method == "mtp":
            return _next_tokens(config, target, checkpoint, platform, build, weights=weights)
        return _head(config, asked, target, checkpoint, platform, build, weights=weights)
    if asked is None or asked.model is None:
        return None
    named = f"speculative_config: model={asked.model!r}"
    config_only = config.load_format == "dummy" or not weights
    found = open_checkpoint(asked.model, revision=asked.revision, config_only=config_only)
    require_method(asked.quantization, found.config)
    _same_tokens(named, checkpoint, found, target)
    model = build_model(
        found.config,
        max_model_len=max_model_len,
        table_blocks=0,
        dtype=next(target.parameters()).dtype,
        cache_dtype=cache_dtype,
        platform=platform,
    )
    states = [name for name, each in model.caches().items() if each.lifetime.rewritten]
    if states:
        raise ConfigError(
            f"{named} has layers with a recurrent state ({states[0]}), from which drafts that do "
            "not count cannot be taken back yet; give another model"
        )
    fill = partial(load_weights, model, found.path, config.load_format, platform, config.seed)
    if weights:
        fill()
    return IndependentModel(model, fill)


def _head(
    config: EngineConfig,
    asked: Speculation,
    target: CausalLM,
    checkpoint: Checkpoint,
    platform: Platform,
    build: Build,
    *,
    weights: bool,
) -> HeadModel:
    made_up = config.load_format == "dummy"
    path = find_head(
        asked.model, checkpoint.path, asked.revision, config_only=made_up or not weights
    )
    if weights:
        head = load_head(
            path, target, build, platform, load_format=config.load_format, seed=config.seed
        )
    else:
        head = build_head(path, target, build, made_up=not any(path.glob("*.safetensors")))
    fill = partial(load_weights, head, path, config.load_format, platform, config.seed)
    return HeadModel(head, fill)


def _next_tokens(
    config: EngineConfig,
    target: CausalLM,
    checkpoint: Checkpoint,
    platform: Platform,
    build: Build,
    *,
    weights: bool,
) -> HeadModel:
    """The target's own layer, from its own checkpoint."""
    head = models.build_mtp(checkpoint.config, build, target)
    path = checkpoint.path
    fill = partial(load_weights, head, path, config.load_format, platform, config.seed)
    if not weights:
        return HeadModel(head, fill)
    stored = () if config.load_format == "dummy" else stored_tensors(path)
    if stored and not any(name.startswith(PREFIX) for name in stored):
        raise LoadError(
            f"speculative_config: {path} has no tensors of the layer that drafts further tokens "
            f"({PREFIX}*), which copies of checkpoints may leave out; take the original one, or "
            "use 'method': 'ngram'"
        )
    fill()
    return HeadModel(head, fill)


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
