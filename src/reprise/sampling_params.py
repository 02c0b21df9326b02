"""How the tokens of one request are chosen and when it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reprise.errors import RequestError

MAX_COMPLETIONS = 16384
"""Of one prompt, as in vLLM: they are created between two steps, while other requests wait."""

MAX_LOGPROBS = 20
"""Most alternatives that can be returned for one position."""

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the most likely token is taken."""

_SEED_LIMIT = 2**63
_TOKEN_LIMIT = 2**31


@dataclass(frozen=True)
class SamplingParams:
    """Validated once, when created. Names and defaults are vLLM's.

    Raises:
        RequestError: A value has the wrong type, is out of range, or conflicts with another one.
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
    """Return the logprob of each sampled token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    skip_special_tokens: bool = True
    """Special tokens do not appear in the text."""
    spaces_between_special_tokens: bool = True
    """Accepted for compatibility, without effect."""
    include_stop_str_in_output: bool = False
    """The text ends behind the stop string that was found, not before it."""
    detokenize: bool = True
    """Produce text; False: token ids only."""

    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """``stop`` in one form."""

    def __post_init__(self) -> None:
        for name, low, remedy in _INTEGERS:
            self._check_integer(name, low, remedy)
        for name, test, remedy in _NUMBERS:
            self._check_number(name, test, remedy)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "give True or False")
        self._check_logit_bias()
        self._check_seed()
        for name in ("logprobs", "prompt_logprobs"):
            self._check_logprobs(name)
        self._check_stops()
        self._check_conflicts()

    @property
    def greedy(self) -> bool:
        """The most likely token is taken at each position."""
        return self.temperature < GREEDY_TEMPERATURE

    def _check_integer(self, name: str, low: int, remedy: str) -> None:
        value = getattr(self, name)
        if name == "max_tokens" and value is None:
            return
        if not _is_integer(value) or value < low:
            raise _invalid(name, value, remedy)
        if name == "n" and value > MAX_COMPLETIONS:
            raise _invalid(name, value, f"give at most {MAX_COMPLETIONS}, or several requests")

    def _check_number(self, name: str, test: Any, remedy: str) -> None:
        value = _finite(getattr(self, name))
        if value is None or not test(value):
            raise _invalid(name, getattr(self, name), remedy)
        object.__setattr__(self, name, value)

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        remedy = "give a dict from token id to a number from -100 to 100, or None"
        if not isinstance(self.logit_bias, Mapping):
            raise _invalid("logit_bias", self.logit_bias, remedy)
        biases: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            number = _finite(bias)
            if not _is_token(token) or number is None or abs(number) > 100:
                raise _invalid("logit_bias", {token: bias}, remedy)
            biases[token] = number
        # Copied, so that a caller who changes his dict does not change a running request.
        object.__setattr__(self, "logit_bias", biases or None)

    def _check_seed(self) -> None:
        if self.seed is None:
            return
        if not _is_integer(self.seed) or not -_SEED_LIMIT <= self.seed < _SEED_LIMIT:
            raise _invalid("seed", self.seed, "give an integer of 64 bits, or None")
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    def _check_logprobs(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if _is_integer(value) and value == -1:
            remedy = f"the whole vocabulary is not supported, give 0 to {MAX_LOGPROBS}"
            raise _invalid(name, value, remedy)
        if not _is_integer(value) or not 0 <= value <= MAX_LOGPROBS:
            raise _invalid(name, value, f"give an integer from 0 to {MAX_LOGPROBS}, or None")

    def _check_stops(self) -> None:
        stops = () if self.stop is None else self.stop
        strings = (stops,) if isinstance(stops, str) else stops
        remedy = "give a string or a list of strings, none of them empty"
        if not isinstance(strings, list | tuple):
            raise _invalid("stop", self.stop, remedy)
        for string in strings:
            if not isinstance(string, str) or not string:
                raise _invalid("stop", self.stop, remedy)
        object.__setattr__(self, "stop_strings", tuple(strings))

        tokens = () if self.stop_token_ids is None else self.stop_token_ids
        remedy = "give a list of token ids"
        if not isinstance(tokens, list | tuple | set | frozenset):
            raise _invalid("stop_token_ids", tokens, remedy)
        if not all(_is_token(token) for token in tokens):
            raise _invalid("stop_token_ids", tokens, remedy)
        object.__setattr__(self, "stop_token_ids", tuple(tokens))

    def _check_conflicts(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            remedy = f"it must not exceed max_tokens={self.max_tokens}"
            raise _invalid("min_tokens", self.min_tokens, remedy)
        if self.stop_strings and not self.detokenize:
            remedy = "stop strings are found in text: set detokenize=True or use stop_token_ids"
            raise _invalid("stop", self.stop, remedy)


_INTEGERS = [
    ("n", 1, "give an integer of at least 1"),
    ("top_k", -1, "give an integer of at least 1, or 0 (or -1) for all tokens"),
    ("max_tokens", 1, "give an integer of at least 1, or None"),
    ("min_tokens", 0, "give an integer of at least 0"),
]
_NUMBERS = [
    ("temperature", lambda x: x >= 0, "give a number of at least 0; 0 is greedy"),
    ("top_p", lambda x: 0 < x <= 1, "give a number above 0 and at most 1"),
    ("min_p", lambda x: 0 <= x <= 1, "give a number from 0 to 1"),
    ("repetition_penalty", lambda x: x > 0, "give a number above 0; 1 is no penalty"),
    ("presence_penalty", lambda x: -2 <= x <= 2, "give a number from -2 to 2"),
    ("frequency_penalty", lambda x: -2 <= x <= 2, "give a number from -2 to 2"),
]
_FLAGS = [
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "detokenize",
]


def _invalid(name: str, value: object, remedy: str) -> RequestError:
    return RequestError(f"{name}={value!r}: {remedy}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOKEN_LIMIT


def _finite(value: object) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
