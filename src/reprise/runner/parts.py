"""What an engine makes around a model to compute steps: the same on a device and on paper."""

from __future__ import annotations

from dataclasses import dataclass

from reprise.cache.layout import CacheLayout, lay_out_caches
from reprise.cache.spec import LayerCache
from reprise.config import EngineConfig
from reprise.distributed import Agreement
from reprise.errors import ConfigError
from reprise.layers.causal_lm import CausalLM
from reprise.ops import OpTable
from reprise.platforms import Platform
from reprise.runner.buffers import StepBuffers
from reprise.runner.drafts import Drafter, caches_with, lookahead_of, make_drafter
from reprise.runner.drafts.draft_model import DraftModel
from reprise.runner.forward_pass import ForwardPass
from reprise.runner.sampler import Sampler


@dataclass(frozen=True)
class Parts:
    """Everything with memory of its own on the device but for weights, caches and graphs."""

    caches: dict[str, LayerCache]
    """By name, of the model and of what drafts for it; their memory is yet to be allocated."""
    layout: CacheLayout
    """Of the caches, with the smallest number of blocks."""
    lookahead: int
    """Places that a draft model needs behind those of the tokens that a step verifies."""
    buffers: StepBuffers
    """The inputs of steps."""
    forward_pass: ForwardPass
    sampler: Sampler
    drafter: Drafter | None


def make_parts(
    config: EngineConfig,
    platform: Platform,
    model: CausalLM,
    draft: DraftModel | None,
    table: OpTable,
    *,
    max_tokens: int,
    max_model_len: int,
    in_step: Agreement | None = None,
) -> Parts:
    """Make the parts around a model.

    Args:
        config: The engine's options.
        platform: The device.
        model: Computes hidden states and logits.
        draft: A model that drafts for it.
        table: The implementations of ops in use.
        max_tokens: Most tokens in a step.
        max_model_len: Most tokens of a request.
        in_step: See :func:`make_drafter`.

    Raises:
        ConfigError: A layer's state cannot take back drafts, and the options ask for some.
    """
    num_drafts, max_requests = config.num_drafts, config.max_num_seqs
    caches = caches_with(model, draft)
    for name, each in caches.items():
        if each.lifetime.rewritten and each.drafts < num_drafts:
            raise ConfigError(
                f"speculative_config: the state of {name} cannot take back drafts that do not "
                "count; leave it out"
            )
    block_size = config.block_size or platform.default_block_size
    lookahead = lookahead_of(draft, config.speculation)
    layout = lay_out_caches(caches, block_size, num_drafts, lookahead)
    max_logits = max_requests * (1 + num_drafts)
    buffers = StepBuffers(
        max(max_tokens, max_logits),
        max_requests,
        max_model_len,
        layout,
        platform,
        num_drafts=num_drafts,
    )
    forward_pass = ForwardPass(
        model,
        buffers,
        table,
        platform,
        max_tokens=max_tokens,
        max_logits=max_logits,
        caches=caches,
        draft=draft,
        taps=() if draft is None else draft.taps,
    )
    drafter: Drafter | None = None
    if config.speculation is not None:
        drafter = make_drafter(
            config.speculation, draft, buffers, forward_pass,
            max_tokens=max_tokens, max_model_len=max_model_len, in_step=in_step,
        )  # fmt: skip
    sampler = Sampler(model.vocab_size, buffers.rows, platform)
    return Parts(caches, layout, lookahead, buffers, forward_pass, sampler, drafter)
