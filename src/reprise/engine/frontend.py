"""What callers' prompts and parameters are checked against, wherever the engine is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise import timeline
from reprise.arguments import shown
from reprise.config import EngineConfig
from reprise.engine.prompt import PreparedPrompt, prepare
from reprise.engine.structured import GrammarCompiler
from reprise.engine.submission import PreparedParams, prepare_params
from reprise.errors import RequestError
from reprise.loading import Checkpoint, recommended
from reprise.sampling_params import SamplingParams


def load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Any:
    """The tokenizer; None with ``skip_tokenizer_init``.

    Raises:
        RepriseError: It is not found.
    """
    if config.skip_tokenizer_init:
        return None
    with timeline.span("tokenizer"):
        # The model's files are of its own revision.
        other = config.model if config.tokenizer_revision else None
        return checkpoint.tokenizer(
            config.tokenizer or other, config.tokenizer_revision or config.revision
        )


class Frontend:
    """What is known of a model without a device.

    Args:
        config: Options, as the engine has them.
        tokenizer: None: prompts are token ids.
        generation_config: What the checkpoint recommends.
        vocab_size: Ids are smaller.
        max_model_len: Most tokens of a request.
        devices: Names of those that compute.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Any,
        generation_config: Mapping[str, Any],
        vocab_size: int,
        max_model_len: int,
        devices: tuple[str, ...],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.devices = devices
        self.compiler: GrammarCompiler | None = None
        """Of grammars; None: the engines are elsewhere, and compile them there."""

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the checkpoint's generation config recommends."""
        return SamplingParams(**{**recommended(self.generation_config), **changes})

    def prepare(self, prompt: Any) -> PreparedPrompt:
        """What an engine does to a prompt first, if it is not done yet. Any thread may call it.

        Raises:
            RequestError: The prompt is invalid.
        """
        if isinstance(prompt, PreparedPrompt):
            return prompt
        return prepare(prompt, self.tokenizer, self.vocab_size)

    def prepare_params(self, params: SamplingParams | PreparedParams | None) -> PreparedParams:
        """What an engine does to parameters first, if it is not done yet. Any thread may call it.

        Raises:
            RequestError: A parameter is invalid.
        """
        if isinstance(params, PreparedParams):
            return params
        params = self.default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params={shown(params)}: give a SamplingParams")
        limit = self.config.max_logprobs
        return prepare_params(params, self.tokenizer, self.vocab_size, limit, self.compiler)
