"""What an engine opens first: the checkpoint, its tokenizer, and the model on its device."""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from reprise import timeline
from reprise.config import EngineConfig
from reprise.distributed import ALONE, Ranks
from reprise.engine.frontend import load_tokenizer
from reprise.errors import ConfigError, describe
from reprise.loading import Checkpoint, checkpoint_of, end_of_text_id, require_method
from reprise.ops.ahead import load_compiler, wake_compiler
from reprise.parallel import Elsewhere, Leader, LeadingRunner, Lockstep
from reprise.platforms import Platform
from reprise.runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model that can compute."""

    checkpoint: Checkpoint
    tokenizer: Any
    """None with ``skip_tokenizer_init``."""
    runner: ModelRunner
    """Its owner closes it."""
    devices: tuple[str, ...]
    """Names of those that compute it, one a rank."""


def refuse_several(config: EngineConfig) -> None:
    """An engine is one, in this process.

    Raises:
        ConfigError: The options ask for several, or for one elsewhere.
    """
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={config.data_parallel_size}: an Engine is one; LLM, AsyncLLM "
            "and 'reprise serve' have several"
        )
    if config.computes_elsewhere:
        raise ConfigError(
            f"distributed_executor_backend={config.distributed_executor_backend!r}: an Engine "
            "is in this process; LLM, AsyncLLM and 'reprise serve' have one elsewhere"
        )


def _holds_memory(platform: Platform) -> bool:
    """Whether something of this process is on the device, or may be."""
    try:
        return platform.memory_allocated() > 0
    except Exception as error:  # a device that has lost count computes all the same
        logger.warning("memory in use is not known, and taken for some (%s)", describe(error))
        return True


def open_model(
    config: EngineConfig,
    platform: Platform,
    elsewhere: Elsewhere | None,
    lockstep: Lockstep | None,
) -> Opened:
    """Read the checkpoint, make the tokenizer and the runner; of several ranks, the first one's.

    Args:
        config: Options, adjusted by the platform.
        platform: Where this process computes.
        elsewhere: The ranks, if another program has started them.
        lockstep: Of engines that compute in step, if this is one.

    Raises:
        RepriseError: Ranks, model or options do not work; nothing stays allocated.
    """
    leader = None
    if config.tensor_parallel_size > 1:
        with timeline.span("ranks"):
            leader = Leader(config, platform, elsewhere, lockstep)
    with contextlib.nullcontext() if leader is None else leader.starting():
        # A device starts in its driver, kernels are loaded by Python: neither waits for the other.
        loading = partial(load_compiler, platform)
        waking = partial(wake_compiler, platform, config.tensor_parallel_size)
        # Engines that nothing refers to any more give their memory back before this one takes its
        # own. Where there was none a look through all objects only takes the interpreter's time.
        earlier = platform.counts_memory and _holds_memory(platform)
        with contextlib.ExitStack() as warming:
            with timeline.span("config"):
                warming.enter_context(platform.warming_up(beside=loading, then=waking))
                checkpoint = checkpoint_of(config)
                require_method(config.quantization, checkpoint.config)
                tokenizer = load_tokenizer(config, checkpoint)
                if earlier:  # the device wakes meanwhile
                    gc.collect()
                if leader is not None or lockstep is not None:
                    warming.close()
            if leader is not None:
                ranks = leader.start(config, checkpoint)
                leading = LeadingRunner(config, platform, checkpoint, leader, ranks)
                return Opened(checkpoint, tokenizer, leading, leader.devices)
            if lockstep is not None:
                ranks = lockstep.connect(config)
            else:
                ranks = Ranks(exchange=ALONE if config.enable_expert_parallel else None)
            runner = ModelRunner(config, platform, checkpoint, ranks, warming.close)
            return Opened(checkpoint, tokenizer, runner, (str(platform.device),))


def end_of_text(opened: Opened) -> frozenset[int]:
    """The tokens that end a text: those that the configs list, and the tokenizer's own."""
    listed, tokenizer = opened.checkpoint.stop_token_ids, opened.tokenizer
    own = None if tokenizer is None else end_of_text_id(tokenizer)
    stops = listed if own is None else listed | {own}
    if stops != listed:
        logger.info(
            "token %d (%s) ends a text too: the tokenizer says so, the configs list %s",
            own, tokenizer.eos_token, sorted(listed) or "none",
        )  # fmt: skip
    vocab_size = opened.runner.model.vocab_size
    known = frozenset(each for each in stops if 0 <= each < vocab_size)
    if stops != known:
        logger.warning(
            "end-of-sequence tokens %s are dropped: the vocabulary has ids 0 to %d",
            sorted(stops - known),
            vocab_size - 1,
        )
    return known
