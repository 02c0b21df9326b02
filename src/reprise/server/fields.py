"""The fields of requests: what is read, what is refused, what means nothing.

Types are checked here as far as they are simple; ranges, and how fields go together, are the
business of :class:`reprise.SamplingParams`.
"""

from __future__ import annotations

import functools
import marshal
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from reprise.arguments import shown
from reprise.errors import RequestError
from reprise.neutral import is_neutral
from reprise.sampling_params import SamplingParams
from reprise.server.errors import ApiError, invalid
from reprise.server.structured import structured_outputs

_PROMPT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        },
    ]
}
_STOP: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        {"type": "null"},
    ]
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(BaseModel):
    """What completions and chats share."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Any = Field(None, json_schema_extra=_STOP)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    max_tokens: int | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    num_drafts: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), le=2**31)
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=4096)
    request_id: str | None = Field(None, max_length=128)
    thinking_token_budget: int | None = None
    response_format: Any = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def usage_in_stream(self) -> tuple[bool, bool]:
        """At the end, and in each chunk."""
        options = self.stream_options
        if options is None:
            return False, False
        each = bool(options.continuous_usage_stats)
        return bool(options.include_usage), each and bool(options.include_usage)


class CompletionRequest(Generation):
    """Body of ``POST /v1/completions``."""

    prompt: Any = Field(json_schema_extra=_PROMPT)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Any] = Field(
        min_length=1,
        max_length=10_000,
        json_schema_extra={
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
                    "content": {
                        "anyOf": [
                            {"type": "string"},
                            {"type": "null"},
                            {"type": "array", "items": {"type": "object"}},
                        ]
                    },
                },
            }
        },
    )
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Any] | None = Field(None, max_length=512)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    include_reasoning: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[Any] | None = None


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: ``prompt`` or ``messages``."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = Field(None, min_length=1, max_length=10_000)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = Field(None, max_length=512)


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    tokens: list[int]


class AbortRequest(BaseModel):
    """Body of ``POST /abort``."""

    model_config = ConfigDict(strict=True, extra="allow")
    request_id: str = Field(min_length=1, max_length=256)


MEANINGLESS = frozenset(
    {
        "user", "store", "metadata", "service_tier",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
        "safety_identifier", "verbosity", "prediction", "web_search_options",
        "session_id", "length_penalty", "early_stopping",
    }
)  # fmt: skip
"""Fields of the OpenAI API, or of vLLM's, that change nothing here and that clients always send."""

_STRUCTURED = "give structured_outputs, an object with one of json, regex, choice and grammar"
CONSTRAINTS: Mapping[str, tuple[tuple[Any, ...], str]] = dict.fromkeys(
    ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
     "guided_whitespace_pattern", "json_schema", "regex", "ebnf", "grammar"),
    ((), _STRUCTURED),
)  # fmt: skip
"""What other servers call them: a text would be unconstrained, and look as if it was."""
_LIMIT = ((), "give max_tokens")
_BEAMS = "beam search is not supported: use n and a temperature"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "suffix": ((), "insertion is not supported: put the suffix into the prompt"),
    "use_beam_search": ((False,), _BEAMS),
    **CONSTRAINTS,
    "max_new_tokens": _LIMIT,
    "n_predict": _LIMIT,
    "num_predict": _LIMIT,
    "repeat_penalty": ((1,), "give repetition_penalty"),
    "moderation": ((), "this server has no moderation"),
    "functions": (([],), "give tools"),
    "function_call": (("none",), "give tool_choice"),
    "audio": ((), "this model writes text alone"),
    "modalities": ((["text"],), "this model writes text alone"),
    "kv_transfer_params": ((), "caches are not moved between servers"),
    "prompt_embeds": ((), "prompts are text or token ids"),
    "logits_processors": (([],), "give logit_bias, allowed_token_ids or bad_words"),
    "mm_processor_kwargs": (({},), "this model reads text alone"),
    # Of these, each is a field of the one API and an extra one of the other.
    "max_completion_tokens": _LIMIT,
    "echo": ((False,), "a chat's prompt is not repeated: use /v1/completions"),
}
"""Field to the values, beside null, at which it asks for nothing, and what to say at others."""

MOST = "most_new_tokens"
"""Among the defaults of sampling values: a limit of the server's."""
_KNOWN = MEANINGLESS | REFUSED.keys() | {"best_of", "parallel_tool_calls"}
_NAMES = frozenset(SamplingParams.__dataclass_fields__)


def refuse_what_is_not_here(request: Generation) -> None:
    """
    Raises:
        ApiError: A field asks for something that this server does not have.
    """
    extra = request.model_extra or {}
    for name, value in extra.items():
        if name not in REFUSED:
            continue
        neutral, remedy = REFUSED[name]
        if not is_neutral(value, neutral):
            raise ApiError(400, f"{name}={shown(value)}: {remedy}", param=name)
    best_of = extra.get("best_of")
    if best_of is not None and (type(best_of) is not int or best_of != (request.n or 1)):
        raise ApiError(
            400, f"best_of={shown(best_of)}: it must be n={request.n or 1}; {_BEAMS}",
            param="best_of",
        )  # fmt: skip
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options are given and stream is not true", param="stream_options"
        )
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(
            400, "prompt_logprobs and stream=true exclude each other", param="prompt_logprobs"
        )


def unknown_names(request: BaseModel) -> list[str]:
    """Fields that are ignored."""
    extra = request.model_extra or {}
    found = [name for name, value in extra.items() if name not in _KNOWN and value is not None]
    options = getattr(request, "stream_options", None)
    if options is not None:
        found += [f"stream_options.{name}" for name in options.model_extra or {}]
    return found


@functools.cache
def _sampling_names(kind: type[BaseModel]) -> frozenset[str]:
    """Fields that mean there what they mean in :class:`reprise.SamplingParams`."""
    return _NAMES & kind.model_fields.keys()


MOST_KEPT = 1 << 12
"""Bytes of parameters that are kept."""
_checked: bytes | None = None
"""Parameters that were found valid last: those of a burst are mostly equal, and to check them takes
as long as to read the whole request."""


def _check(fields: dict[str, Any]) -> None:
    global _checked
    # Bytes tell 1 from True, which is refused; version 2 has nothing of an object's history.
    same = marshal.dumps(fields, 2)
    if same == _checked:
        return
    try:
        SamplingParams(**fields)
    except RequestError as error:
        raise invalid(error) from None
    _checked = same if len(same) <= MOST_KEPT else None


def sampling(request: Generation, defaults: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Fields of :class:`reprise.SamplingParams` by name, checked.

    Args:
        request: What it says counts most.
        defaults: For what it leaves out; with ``most_new_tokens`` among them, if there are such.
        **changes: Fields that have other names in requests.

    Raises:
        ApiError: A value is out of range, or does not go with another one.
    """
    given = {
        name: value
        for name in _sampling_names(type(request))
        if (value := getattr(request, name)) is not None
    }
    wanted = structured_outputs(request)
    if wanted is not None:
        given["structured_outputs"] = wanted
    fields = {**defaults, **given, **changes}
    most = fields.pop(MOST, None)
    if most is not None:
        asked = fields.get("max_tokens", SamplingParams.max_tokens)
        fields["max_tokens"] = most if asked is None else min(asked, most)
    bias = fields.get("logit_bias")
    if bias is not None:
        wrong = [
            each
            for each in bias
            if not (each.isascii() and each.isdigit() and len(each) < 12 and str(int(each)) == each)
        ]
        if wrong:
            raise ApiError(
                400, f"logit_bias has the key {shown(wrong[0])}: give token ids", param="logit_bias"
            )
        fields["logit_bias"] = {int(token): each for token, each in bias.items()}
    if request.thinking_token_budget is not None:
        fields["thinking_token_budget"] = request.thinking_token_budget
    _check(fields)
    fields.pop("thinking_token_budget", None)
    if bias is not None:
        fields["logit_bias"] = bias
    return fields
