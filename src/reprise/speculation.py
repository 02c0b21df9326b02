"""What tokens are drafted with, as vLLM's ``speculative_config`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reprise.arguments import is_whole, plain, shown, unknown_names
from reprise.errors import ConfigError

WIDTHS = (0, 1, 3, 7)
"""Drafts that a step has room for: what is asked for is rounded up, so that graphs and kernels meet
requests of 2, 4 or 8 tokens alone."""
LOOKUP = 5
"""Tokens of an n-gram, unless told otherwise."""

_NAMES = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
_SYNTHETIC = "synthetic_acceptance"
_DRAFT_MODELS = (
    "draft_model", "eagle", "eagle3", "mtp", "medusa", "mlp_speculator", "suffix", "dflash",
    "dspark", "extract_hidden_states", "custom_class",
)  # fmt: skip
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "draft_sample_method": ("greedy",), "disable_padded_drafter_batch": (False,),
    "parallel_drafting": (False,), "enforce_eager": (False,),
}  # fmt: skip
"""vLLM's other names, and the values besides None at which they ask for nothing."""


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted. Drafts change no token, only how many come of a step."""

    num_tokens: int
    """K: tokens drafted behind a request's newest one."""
    lookup_max: int = LOOKUP
    lookup_min: int = LOOKUP
    """Most and fewest last tokens of a text that are looked for earlier in it."""
    synthetic_acceptance: float | None = None
    """For measurements: each draft counts with this chance, whatever it is. The tokens mean
    nothing."""

    @property
    def width(self) -> int:
        """Drafts that a step has room for."""
        return next(each for each in WIDTHS if each >= self.num_tokens)


def parse_speculation(config: Mapping[str, Any] | None) -> Speculation | None:
    """Read ``speculative_config``; None: nothing is drafted.

    Raises:
        ConfigError: A name or a value that is not supported.
    """
    left = {str(k): plain(v) for k, v in (config or {}).items() if v is not None}
    if not left:
        return None
    try:
        return _parse(left)
    except ConfigError as error:
        raise ConfigError(f"speculative_config={shown(config)}: {error}") from None


def _parse(left: dict[str, Any]) -> Speculation:
    """``left``: what was given, without None."""
    if left.get("model") in ("ngram", "[ngram]"):
        left.setdefault("method", "ngram")
        del left["model"]
    method = left.pop("method", None)
    if method == "ngram_gpu":
        method = "ngram"  # as vLLM calls drafting on the device
    if "model" in left or method in _DRAFT_MODELS:
        name = f"method={method!r}" if method in _DRAFT_MODELS else f"model={left['model']!r}"
        raise ConfigError(
            f"{name}: models that draft are not supported; use "
            "'method': 'ngram', which drafts from the text itself"
        )
    if method not in ("ngram", "synthetic"):
        raise ConfigError(f"method={method!r} must be 'ngram'")
    for name, values in _NEUTRAL.items():
        value = left.pop(name, None)
        if value is not None and value not in values:
            raise ConfigError(f"{name}={value!r} is not supported; leave it out")
    known = (*_NAMES, _SYNTHETIC) if method == "synthetic" else _NAMES
    unknown = [each for each in left if each not in known]
    if unknown:
        raise ConfigError(f"{unknown_names('name', unknown, _NAMES)}")
    tokens = _number(left, "num_speculative_tokens", None, WIDTHS[-1])
    most, least = left.get("prompt_lookup_max"), left.get("prompt_lookup_min")
    most = _number(left, "prompt_lookup_max", LOOKUP if least is None else least)
    least = _number(left, "prompt_lookup_min", most)
    if least > most:
        raise ConfigError(f"prompt_lookup_min={least} must not be above prompt_lookup_max={most}")
    return Speculation(tokens, most, least, _chance(left) if method == "synthetic" else None)


def _number(given: Mapping[str, Any], name: str, default: Any, most: int | None = None) -> int:
    value = given.get(name, default)
    if not is_whole(value) or value < 1 or (most is not None and value > most):
        limit = "of at least 1" if most is None else f"from 1 to {most}"
        raise ConfigError(f"{name}={value!r} must be a whole number {limit}")
    return int(value)


def _chance(given: Mapping[str, Any]) -> float:
    value = given.get(_SYNTHETIC)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{_SYNTHETIC}={value!r} must be from 0 to 1")
    return float(value)
