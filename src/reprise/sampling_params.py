"""How the tokens of one request are chosen and when it stops."""

from __future__ import annotations

import copy
import dataclasses
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from reprise.arguments import is_whole, plain, plain_list, shown, takes_names
from reprise.errors import RequestError
from reprise.neutral import drop_neutral
from reprise.structured_outputs import StructuredOutputsParams
from reprise.vllm_names import SAMPLING

MAX_COMPLETIONS = 16384
"""Of one prompt, as in vLLM: they are created between two steps, while other requests wait."""

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the most likely token is taken."""

WHOLE_VOCABULARY = -1
"""As ``logprobs`` and ``prompt_logprobs``."""

_SEED_LIMIT = 2**63
_WHOLE_LIMIT = 2**63
"""Devices count in 64 bits."""
_TOKEN_LIMIT = 2**31
_MOST_DIGITS = 100
"""Of a token id as text: many more are no number to Python."""
_PENALTY_LIMIT = 1e30
"""Logits of any model, times or divided by this, are numbers in float32."""


class RequestOutputKind(Enum):
    """What each item of a stream holds."""

    CUMULATIVE = 0
    """Everything generated so far."""
    DELTA = 1
    """What is new since the item before."""
    FINAL_ONLY = 2
    """Everything; the stream has one item, at the end."""


def _translate(arguments: dict[str, Any]) -> dict[str, Any]:
    return drop_neutral(arguments, SAMPLING, _NAMES, "sampling parameter", RequestError)


@takes_names(_translate, RequestError)
@dataclass(kw_only=True)
class SamplingParams:
    """Names and defaults are vLLM's. Numbers may be numpy's, lists may be arrays.

    Fields may be changed until a request is submitted, which takes a copy. Values are validated
    when the object is made and when it is submitted. vLLM's other names are accepted where they
    ask for nothing: see :mod:`reprise.vllm_names`.

    Raises:
        RequestError: A name is unknown, or a value has the wrong type, is out of range, or
            conflicts with another one.
    """

    n: int = 1
    """Number of completions of the prompt."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities sum to this; 1: all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 or -1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides (logits > 0) or multiplies (< 0) the logits of tokens seen in prompt or output."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token seen in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that it is in the output."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; -100 to 100."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these tokens are drawn. The end-of-sequence token is not among them unless listed."""
    bad_words: Sequence[str] | None = None
    """Texts that are not generated: of their tokens, with and without a leading space, the last
    one is never drawn behind the others. If no other token is allowed it is drawn nevertheless."""
    seed: int | None = None
    """Same seed, same tokens; None or -1: the engine's seed and the number of requests before it
    make one."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as the context holds."""
    min_tokens: int = 0
    """No stop condition ends the request before this many tokens."""
    stop: str | Sequence[str] | None = None
    """Strings that end the request when they appear in its text."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the request, besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """End-of-sequence tokens of the model do not end the request."""
    logprobs: int | None = None
    """Return the logprob of each sampled token and of this many most likely ones; -1: of the whole
    vocabulary. The engine's ``max_logprobs`` is the limit."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    truncate_prompt_tokens: int | None = None
    """Use this many last tokens of the prompt; -1: as many as leave room for ``max_tokens``."""
    skip_reading_prefix_cache: bool | None = None
    """Compute every token of the prompt, as with ``prompt_logprobs``."""
    num_drafts: int | None = None
    """Most tokens that are drafted behind the newest one, where the engine drafts any; None: as
    many as it does. No token depends on it."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the text must be. Needs ``reprise[structured]``. The model's end-of-sequence token is
    drawn when the text can end, and before ``min_tokens`` or with ``ignore_eos`` only if it must
    end. Not with ``allowed_token_ids``. Log probabilities are the model's own."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """What each item of a stream holds. ``LLM`` returns whole outputs whatever it says."""
    skip_special_tokens: bool = True
    """Special tokens do not appear in the text."""
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility, without effect."""
    include_stop_str_in_output: bool = False
    """The text ends behind the stop string that was found, not before it."""
    detokenize: bool = True
    """Produce text; False: token ids only."""

    def __post_init__(self) -> None:
        # Mostly a few fields are given, and a server makes one for each request.
        values = vars(self)
        given = {
            name for name, default in _DEFAULTS.items()
            if values.get(name, default) is not default
        }  # fmt: skip
        for name, low, remedy in _INTEGERS:
            if name in given:
                self._check_integer(name, low, remedy)
        for name, test, remedy in _NUMBERS:
            if name in given:
                self._check_number(name, test, remedy)
        for name in _FLAGS:
            if name in given:
                self._check_flag(name)
        self._check_logit_bias()
        self._check_seed()
        self._check_tokens("stop_token_ids")
        self._check_tokens("allowed_token_ids")
        self._check_texts("stop")
        self._check_texts("bad_words")
        self._check_structured()
        if not isinstance(self.output_kind, RequestOutputKind):
            kinds = ", ".join(each.name for each in RequestOutputKind)
            remedy = f"give a RequestOutputKind: {kinds}"
            raise _invalid("output_kind", self.output_kind, remedy)
        self._check_conflicts()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _NAMES or _translate({name: value}):
            super().__setattr__(name, value)

    @classmethod
    def from_optional(cls, **values: Any) -> Self:
        """As the constructor, for values from JSON: None is the default, and ``logit_bias`` may
        have token ids as text."""
        bias = values.get("logit_bias")
        if isinstance(bias, Mapping):
            values["logit_bias"] = {_number_in(token): each for token, each in bias.items()}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def snapshot(self) -> SamplingParams:
        """A validated copy, of this class and with its fields alone: it goes to other processes,
        which do not know a caller's own.

        Raises:
            RequestError: A field was changed to an invalid value.
        """
        values = vars(self)
        made = object.__new__(SamplingParams)
        vars(made).update({name: values.get(name, each) for name, each in _DEFAULTS.items()})
        made.__post_init__()
        return made

    @property
    def greedy(self) -> bool:
        """The most likely token is taken at each position."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` in one form."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check_integer(self, name: str, low: int, remedy: str) -> None:
        value = plain(getattr(self, name))
        if value is None and name in _OPTIONAL:
            return
        if not is_whole(value) or value < low:
            raise _invalid(name, value, remedy)
        if value >= _WHOLE_LIMIT:
            raise _invalid(name, value, f"{remedy}; at most {_WHOLE_LIMIT - 1}")
        if name == "n" and value > MAX_COMPLETIONS:
            raise _invalid(name, value, f"give at most {MAX_COMPLETIONS}, or several requests")
        if name == "truncate_prompt_tokens" and value == 0:
            raise _invalid(name, value, remedy)
        super().__setattr__(name, value)

    def _check_number(self, name: str, test: Callable[[float], bool], remedy: str) -> None:
        value = plain(getattr(self, name))
        number = _finite(value)
        # The device computes in float32: what is not zero here may be zero there.
        if number is None or not test(number) or not test(_float32(number)):
            raise _invalid(name, value, remedy)
        super().__setattr__(name, number)

    def _check_flag(self, name: str) -> None:
        value = plain(getattr(self, name))
        if not isinstance(value, bool) and not (value is None and name in _OPTIONAL):
            raise _invalid(name, value, "give True or False")
        super().__setattr__(name, value)

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        remedy = "give a dict from token id to a number from -100 to 100, or None"
        if not isinstance(self.logit_bias, Mapping):
            raise _invalid("logit_bias", self.logit_bias, remedy)
        biases: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            token, number = plain(token), _finite(plain(bias))
            if not _is_token(token) or number is None or abs(number) > 100:
                raise _invalid("logit_bias", {token: bias}, remedy)
            biases[token] = number
        # Copied, so that a caller that changes its dict does not change a running request.
        super().__setattr__("logit_bias", biases or None)

    def _check_seed(self) -> None:
        seed = plain(self.seed)
        if seed is not None and (not is_whole(seed) or not -_SEED_LIMIT <= seed < _SEED_LIMIT):
            raise _invalid("seed", seed, "give an integer of 64 bits, or None")
        super().__setattr__("seed", None if seed == -1 else seed)

    def _check_tokens(self, name: str) -> None:
        given = getattr(self, name)
        if given is None and name in _OPTIONAL:
            return
        tokens = plain_list(() if given is None else given)
        remedy = "give a list of token ids"
        if name in _OPTIONAL:
            remedy += ", at least one, or None"
            if isinstance(tokens, list) and not tokens:
                raise _invalid(name, given, remedy)
        if not isinstance(tokens, list) or not all(_is_token(token) for token in tokens):
            raise _invalid(name, given, remedy)
        super().__setattr__(name, tuple(dict.fromkeys(tokens)))

    def _check_texts(self, name: str) -> None:
        given = getattr(self, name)
        if given is None:
            return
        if name == "stop" and isinstance(given, str):
            given = [given]
        texts = plain_list(given)
        remedy = "give a list of strings, none of them empty"
        if name == "stop":
            remedy = "give a string or a list of strings, none of them empty"
        if not isinstance(texts, list):
            raise _invalid(name, given, remedy)
        if not all(isinstance(each, str) and each for each in texts):
            raise _invalid(name, getattr(self, name), remedy)
        for each in texts:
            try:
                each.encode()
            except UnicodeEncodeError:
                raise RequestError(
                    f"{name}={shown(each)} is not valid text (half of a surrogate pair): give "
                    "UTF-8, decoded"
                ) from None
        one = isinstance(getattr(self, name), str)
        super().__setattr__(name, texts[0] if one else tuple(dict.fromkeys(texts)))

    def _check_structured(self) -> None:
        given = self.structured_outputs
        if given is None:
            return
        if isinstance(given, Mapping):
            given = StructuredOutputsParams(**given)
        if not isinstance(given, StructuredOutputsParams):
            raise _invalid("structured_outputs", given, "give a StructuredOutputsParams")
        # Validated again: its fields may have been changed.
        names = [each.name for each in dataclasses.fields(StructuredOutputsParams)]
        values = {name: getattr(given, name) for name in names}
        super().__setattr__("structured_outputs", StructuredOutputsParams(**values))

    def _check_conflicts(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            remedy = f"it must not exceed max_tokens={self.max_tokens}"
            raise _invalid("min_tokens", self.min_tokens, remedy)
        if self.structured_outputs is not None and self.allowed_token_ids is not None:
            remedy = "structured_outputs decides which tokens are allowed: give one of them"
            raise _invalid("allowed_token_ids", self.allowed_token_ids, remedy)
        if self.stop_strings and not self.detokenize:
            remedy = "stop strings are found in text: set detokenize=True or use stop_token_ids"
            raise _invalid("stop", self.stop, remedy)


_DEFAULTS = {each.name: each.default for each in dataclasses.fields(SamplingParams)}
_NAMES = frozenset(_DEFAULTS)
_OPTIONAL = {
    "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "allowed_token_ids",
    "skip_reading_prefix_cache", "num_drafts",
}  # fmt: skip
_INTEGERS = [
    ("n", 1, "give an integer of at least 1"),
    ("top_k", -1, "give an integer of at least 1, or 0 (or -1) for all tokens"),
    ("max_tokens", 1, "give an integer of at least 1, or None"),
    ("min_tokens", 0, "give an integer of at least 0"),
    ("logprobs", -1, "give an integer of at least 0, -1 for the whole vocabulary, or None"),
    ("prompt_logprobs", -1, "give an integer of at least 0, -1 for the whole vocabulary, or None"),
    ("truncate_prompt_tokens", -1, "give an integer of at least 1, -1 for what fits, or None"),
    ("num_drafts", 0, "give an integer of at least 0, or None"),
]
_NUMBERS: list[tuple[str, Callable[[float], bool], str]] = [
    ("temperature", lambda x: 0 <= x < math.inf, "give a number of at least 0; 0 is greedy"),
    ("top_p", lambda x: 0 < x <= 1, "give a number above 0 and at most 1"),
    ("min_p", lambda x: 0 <= x <= 1, "give a number from 0 to 1"),
    (
        "repetition_penalty",
        lambda x: 0.99 / _PENALTY_LIMIT <= x <= 1.01 * _PENALTY_LIMIT,  # rounded, too
        f"give a number from {1 / _PENALTY_LIMIT:g} to {_PENALTY_LIMIT:g}, so that logits stay "
        "numbers in float32; 1 is no penalty",
    ),
    ("presence_penalty", lambda x: -2 <= x <= 2, "give a number from -2 to 2"),
    ("frequency_penalty", lambda x: -2 <= x <= 2, "give a number from -2 to 2"),
]
_FLAGS = [
    "ignore_eos",
    "skip_reading_prefix_cache",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
]


def _invalid(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"{name}={shown(value)}: {remedy}")


def _is_token(value: Any) -> bool:
    return is_whole(value) and 0 <= value < _TOKEN_LIMIT


def _finite(value: object) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _float32(value: float) -> float:
    """The nearest number in float32, which is infinite beyond its range."""
    try:
        found: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return found


def _number_in(token: Any) -> Any:
    """A token id that JSON made a text."""
    text = token if isinstance(token, str) and len(token) < _MOST_DIGITS else ""
    return int(text) if text.isascii() and text.isdigit() else token
