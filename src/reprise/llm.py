"""The offline interface, with vLLM's names where the meaning is the same."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from reprise.arguments import plain_list, plain_path, shown
from reprise.config import EngineConfig
from reprise.engine import (
    ContentFormat,
    Engine,
    EngineStats,
    Frontend,
    chat_prompt,
    split_prompts,
    together,
)
from reprise.engine.batch import Asked, Batch
from reprise.errors import RepriseError, RequestError, UnsupportedError
from reprise.graphs import GraphReport
from reprise.loading import as_transformers
from reprise.metrics import Metric
from reprise.outputs import RequestOutput
from reprise.replicas import batch
from reprise.sampling_params import SamplingParams
from reprise.vllm_names import METHODS, refuse_others

Message = Mapping[str, Any]


class LLM:
    """A model ready to generate. Threads may share one: their calls take turns.

    As a context manager it shuts the engine down at the end of the block.

    Args:
        model: Local directory, Hugging Face id, or None for the bundled demo model.
        **options: The fields of :class:`reprise.config.EngineConfig`, and vLLM's other names where
            they ask for nothing (:mod:`reprise.vllm_names`).

    Raises:
        RepriseError: The device, model or options do not work.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self._open: Batch | None = batch(EngineConfig(model=model, **options))
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._process = os.getpid()

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> Self:
        """Make one from options that were put together before."""
        return cls(**engine_args.arguments())

    @property
    def engine(self) -> Engine:
        """What computes.

        Raises:
            RepriseError: It was shut down.
            ConfigError: With ``data_parallel_size`` there are several, in other processes.
        """
        return self._batch.engine

    @property
    def frontend(self) -> Frontend:
        """What is known of the model, wherever it is: its tokenizer, its limits.

        Raises:
            RepriseError: The engine was shut down.
        """
        return self._batch.frontend

    @property
    def _batch(self) -> Batch:
        if self._open is None:
            raise RepriseError("the engine was shut down; create a new LLM")
        if os.getpid() != self._process:
            raise RepriseError(
                "this process was forked and the engine belongs to its parent; create the LLM in "
                "the process that uses it"
            )
        return self._open

    def _ask(self, name: str, *arguments: Any) -> Any:
        return together(name, self._batch.ask(name, *arguments))

    def generate(
        self,
        prompts: Any = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one continuous batch.

        Args:
            prompts: A prompt or a list of them: text, token ids, ``{"prompt": ...}`` or
                ``{"prompt_token_ids": [...]}``. With ``"cache_salt": ...`` in the dictionary it
                shares cached prefixes only with prompts of the same salt. None is refused, with
                what to give for the arguments that vLLM had in its place.
            sampling_params: For all prompts, or one for each; None: as the checkpoint recommends.
            priority: One for each prompt; lower is more urgent.
            use_tqdm: Show progress on standard error if it takes long.
            **others: vLLM's other arguments, which must ask for nothing.

        Returns:
            One output a prompt, in their order.

        Raises:
            RequestError: A prompt or parameter is invalid; then nothing is generated.
            CapacityError: A prompt does not fit the context or the cache; likewise.
            FailedRequestError: The logits of some were NaN or infinite (NonFiniteError), or the
                grammar of some was left (GrammarError). Raised when all others have ended; its
                ``outputs`` are those of all prompts.
        """
        refuse_others(self.generate, others)
        if not isinstance(use_tqdm, bool):
            raise RequestError(f"use_tqdm={shown(use_tqdm)}: give True or False")
        _ = self._batch
        inputs = split_prompts(prompts)
        params = _one_each("sampling_params", sampling_params, SamplingParams, len(inputs))
        urgencies = 0 if priority is None else plain_list(priority)
        priorities = _one_each("priority", urgencies, int, len(inputs))
        with self._lock:
            completed = self._batch.complete(
                [
                    Asked(f"{next(self._ids)}", *each)
                    for each in zip(inputs, params, priorities, strict=True)
                ],
                use_tqdm,
            )
        outputs = [output for output, _ in completed]
        errors = [error for _, error in completed if error is not None]
        if errors:
            count = f"{len(errors)} of {len(outputs)} requests have failed. " if outputs[1:] else ""
            raise type(errors[0])(f"{count}{errors[0]}", outputs)
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
        **others: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several.

        Args:
            messages: ``[{"role": "user", "content": "hi"}, ...]`` as the OpenAI API has them, or a
                list of such lists.
            sampling_params: As in :meth:`generate`.
            chat_template: As of :func:`reprise.engine.chat.chat_prompt`, like the next six.
            chat_template_content_format: How the template gets a message's text.
            add_generation_prompt: End the prompt where the assistant's answer begins.
            continue_final_message: Let the model go on where the last message ends.
            tools: That the model may call.
            documents: That the template reads.
            chat_template_kwargs: Further variables of the template.
            priority: As in :meth:`generate`.
            use_tqdm: As in :meth:`generate`.
            **others: As in :meth:`generate`.

        Raises:
            RequestError: The messages are malformed, the tokenizer has no chat template, or
                tools or documents were given that the template does not read.
        """
        refuse_others(self.chat, others)
        if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
            raise RequestError(
                f"messages={shown(messages)}: give a list of messages, or a list of such lists"
            )
        single = isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [
            chat_prompt(
                self.frontend.tokenizer,
                each,
                chat_template=chat_template,
                chat_template_content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            )
            for each in conversations
        ]
        return self.generate(prompts, sampling_params, priority=priority, use_tqdm=use_tqdm)

    def get_tokenizer(self) -> Any:
        """transformers' tokenizer."""
        if self.frontend.tokenizer is None:
            raise RequestError("no tokenizer is loaded (skip_tokenizer_init=True)")
        return as_transformers(self.frontend.tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation config recommends."""
        return self.frontend.default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. Returns True, for vLLM's may fail."""
        with self._lock:
            done: bool = self._ask("reset_prefix_cache")
            return done

    def update_weights(self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights while the model stands ready, as in reinforcement learning.

        They are copied into the memory that the old ones had, so graphs stay valid; cached
        prefixes are forgotten. Weights that are not given keep their values.

        Args:
            weights: By the name that a checkpoint has for each, as
                ``transformers_model.state_dict()`` gives them. Shapes are the checkpoint's;
                dtypes of floating point numbers are converted. On any device.

        Raises:
            LoadError: Names, shapes or dtypes do not fit, or numbers are NaN or infinite: all of
                them are listed, and nothing was changed. Or a copy failed: then it has to be made
                good by a further call before anything is generated.
        """
        with self._lock:
            self._ask("update_weights", weights)

    def get_metrics(self) -> list[Metric]:
        """What is counted from the start, and gauges of this moment: see
        :mod:`reprise.metrics`."""
        found: list[Metric] = self._ask("metrics")
        return found

    def start_profile(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Record what host and device do until :meth:`stop_profile`.

        Args:
            directory: For the file; None: ``REPRISE_PROFILE_DIR``, or ``reprise-profile`` in the
                working directory.

        Raises:
            RepriseError: A profile is being recorded already.
            ConfigError: The directory cannot be made.
        """
        with self._lock:
            self._ask("start_profile", plain_path(directory))

    def stop_profile(self) -> Path:
        """Write what was recorded, for Chrome's or Perfetto's trace viewer. Returns the file.

        Raises:
            RepriseError: Nothing is being recorded.
        """
        with self._lock:
            file: Path = self._ask("stop_profile")
            return file

    def shutdown(self) -> None:
        """Free the device's memory, after calls of other threads that are under way. Every other
        call afterwards raises a RepriseError. A fork of the process leaves the engine alone."""
        if os.getpid() != self._process:
            return
        with self._lock:
            open_, self._open = self._open, None
            if open_ is not None:
                open_.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            raise UnsupportedError(f"LLM.{name}: {METHODS[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def graph_report(self) -> GraphReport:
        """The resolved graph plan, and what is known of every captured graph."""
        report: GraphReport = self._ask("graph_report")
        return report

    def stats(self) -> EngineStats:
        """The engine's metrics at this moment."""
        stats: EngineStats = self._ask("stats")
        return stats


def _one_each(name: str, value: Any, kind: type, count: int) -> list[Any]:
    if value is None or isinstance(value, kind):
        return [value] * count
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise RequestError(f"{name}={shown(value)}: give one {kind.__name__}, or a list of them")
    values = list(value)
    if len(values) != count:
        raise RequestError(f"{name} has {len(values)} entries for {count} prompt(s): give as many")
    return values
