"""What tokens are drafted with, as vLLM's ``speculative_config`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reprise.arguments import is_whole, plain, shown, unknown_names
from reprise.errors import ConfigError

WIDTHS = (0, 1, 3, 7)
"""Drafts that a step has room for: what is asked for is rounded up, so that graphs and kernels meet
requests of 2, 4 or 8 tokens alone."""
LOOKUP = 5
"""Tokens of an n-gram, unless told otherwise."""

_BY_BATCH = "num_speculative_tokens_per_batch_size"
_COMMON = ("method", "num_speculative_tokens", _BY_BATCH)
_NAMES: Mapping[str, tuple[str, ...]] = {
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "draft_model": ("model", "revision", "quantization", "draft_sample_method", "enforce_eager"),
    "eagle3": ("model", "revision", "draft_sample_method", "enforce_eager"),
    "mtp": ("draft_sample_method", "enforce_eager"),
}
"""What each method takes beside."""
_SYNTHETIC = "synthetic_acceptance"
_OTHER_METHODS = (
    "eagle", "medusa", "mlp_speculator", "suffix", "dflash", "dspark",
    "extract_hidden_states", "custom_class",
)  # fmt: skip
_ALIASES = {
    "ngram_gpu": "ngram", "qwen3_next_mtp": "mtp", "qwen3_5_mtp": "mtp", "qwen3_5_moe_mtp": "mtp",
}  # fmt: skip
"""As vLLM calls drafting on the device, and the layers of single families."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "draft_sample_method": ("greedy",), "disable_padded_drafter_batch": (False,),
    "parallel_drafting": (False,), "enforce_eager": (False,), "use_heterogeneous_vocab": (False,),
    "draft_tensor_parallel_size": (1,), "kv_cache_dtype": ("auto",),
    "max_model_len": (), "code_revision": (), "attention_backend": (), "moe_backend": (),
    "draft_load_config": (), "rejection_sample_method": (), "tensor_parallel_size": (1,),
}  # fmt: skip
"""vLLM's other names, and the values besides None at which they ask for nothing, unless the method
takes them."""


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted. Drafts change no token, only how many come of a step."""

    num_tokens: int
    """K: tokens drafted behind a request's newest one."""
    method: str = "ngram"
    lookup_max: int = LOOKUP
    lookup_min: int = LOOKUP
    """Most and fewest last tokens of a text that are looked for earlier in it."""
    synthetic_acceptance: float | None = None
    """For measurements: each draft counts with this chance, whatever it is. The tokens mean
    nothing."""
    model: str | None = None
    """Directory or Hugging Face id of the model or the head that drafts; None with ``eagle3``: the
    demo model's head."""
    revision: str | None = None
    """Of the model on the Hugging Face hub."""
    quantization: str | None = None
    """The method that its weights must be quantised with; None: as its checkpoint says."""
    greedy: bool = False
    """It drafts the likeliest token, whatever a request asks for; else what the request would draw
    from it, which counts more often."""
    eager: bool = False
    """The draft model runs without graphs."""
    by_batch: tuple[tuple[int, int, int], ...] = ()
    """First and last number of requests, and how many tokens are drafted where so many run."""
    measured: bool = False
    """How many are drafted is found out from how long steps take and how many drafts count."""

    @property
    def width(self) -> int:
        """Drafts that a step has room for."""
        return room_for(self.num_tokens)

    @property
    def levels(self) -> tuple[int, ...]:
        """All numbers of tokens that are drafted now or then, ascending."""
        found = {self.num_tokens, *(each for *_, each in self.by_batch)}
        if self.measured:
            found.add(0)
        return tuple(sorted(found))

    def level(self, requests: int) -> int:
        """How many tokens are drafted where so many requests run, if that is not measured."""
        for first, last, tokens in self.by_batch:
            if first <= requests <= last:
                return tokens
        return self.num_tokens


def room_for(drafts: int) -> int:
    """What a step of so many drafts has room for: the next of :data:`WIDTHS`."""
    return next(each for each in WIDTHS if each >= drafts)


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
    method = left.pop("method", _method_of(left.get("model")))
    method = _ALIASES.get(method, method) if isinstance(method, str) else method
    if method in _OTHER_METHODS:
        raise ConfigError(
            f"method={shown(method)} is not supported; use 'draft_model' with a small model of the "
            "same tokens, or 'ngram', which drafts from the text itself"
        )
    if method not in (*_NAMES, "synthetic"):
        raise ConfigError(f"method={shown(method)} must be one of {', '.join(map(repr, _NAMES))}")
    taken = _NAMES.get(method, (_SYNTHETIC,))
    for name, values in _NEUTRAL.items():
        value = None if name in taken else left.pop(name, None)
        if value is not None and value not in values:
            raise ConfigError(f"{name}={shown(value)} is not supported; leave it out")
    known = (*_COMMON, *taken)
    unknown = [each for each in left if each not in (*known, *_hidden(method))]
    if unknown:
        raise ConfigError(f"{unknown_names('name', unknown, known)}")
    tokens = _number(left, "num_speculative_tokens", None, WIDTHS[-1])
    by_batch, measured = _ranges(left.pop(_BY_BATCH, None), tokens)
    if "draft_sample_method" in taken:
        found = _of_model(method, left, tokens)
        return replace(found, by_batch=by_batch, measured=measured)
    most, least = left.get("prompt_lookup_max"), left.get("prompt_lookup_min")
    most = _number(left, "prompt_lookup_max", LOOKUP if least is None else least)
    least = _number(left, "prompt_lookup_min", most)
    if least > most:
        raise ConfigError(f"prompt_lookup_min={least} must not be above prompt_lookup_max={most}")
    chance = _chance(left) if method == "synthetic" else None
    return Speculation(
        tokens, method, most, least, chance, by_batch=by_batch, measured=measured
    )  # fmt: skip


def _ranges(value: Any, most: int) -> tuple[tuple[tuple[int, int, int], ...], bool]:
    """How many tokens are drafted for how many requests, and whether that is measured."""
    if value is None:
        return (), False
    if value == "auto":
        return (), True
    told = ConfigError(
        f"{_BY_BATCH}={shown(value)} must be 'auto' or a list of [first, last, tokens]: ascending "
        f"numbers of requests, and from 0 to num_speculative_tokens={most} tokens for them"
    )
    if not isinstance(value, list | tuple) or not value:
        raise told
    found, before = [], 0
    for each in value:
        if not isinstance(each, list | tuple) or len(each) != 3 or not all(map(is_whole, each)):
            raise told
        first, last, tokens = map(int, each)
        if not before < first <= last or not 0 <= tokens <= most:
            raise told
        found.append((first, last, tokens))
        before = last
    return tuple(found), False


def _hidden(method: str) -> tuple[str, ...]:
    """What measurements ask for, of what computes drafts or stands for it."""
    return () if method == "ngram" else (_SYNTHETIC,)


def _method_of(model: Any) -> str | None:
    """The method, where only a model is given: by its name, as vLLM tells it."""
    if model is None:
        return None
    return "eagle3" if "eagle3" in str(model).lower() else "draft_model"


def _of_model(method: str, given: Mapping[str, Any], tokens: int) -> Speculation:
    for name in ("model", "revision", "quantization"):
        value = given.get(name)
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{name}={shown(value)} must be text")
    if "model" not in given and method == "draft_model":
        raise ConfigError("method='draft_model' needs model= a directory or Hugging Face id")
    how = given.get("draft_sample_method", "probabilistic")
    if how not in ("greedy", "probabilistic"):
        raise ConfigError(
            f"draft_sample_method={shown(how)} must be 'greedy' or 'probabilistic', the default"
        )
    eager = given.get("enforce_eager", False)
    if not isinstance(eager, bool):
        raise ConfigError(f"enforce_eager={shown(eager)} must be True or False")
    return Speculation(
        tokens, method, model=given.get("model"), revision=given.get("revision"),
        quantization=given.get("quantization"), greedy=how == "greedy", eager=eager,
        synthetic_acceptance=_chance(given) if _SYNTHETIC in given else None,
    )  # fmt: skip


def _number(given: Mapping[str, Any], name: str, default: Any, most: int | None = None) -> int:
    value = given.get(name, default)
    if not is_whole(value) or value < 1 or (most is not None and value > most):
        limit = "of at least 1" if most is None else f"from 1 to {most}"
        raise ConfigError(f"{name}={shown(value)} must be a whole number {limit}")
    return int(value)


def _chance(given: Mapping[str, Any]) -> float:
    value = given.get(_SYNTHETIC)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{_SYNTHETIC}={shown(value)} must be from 0 to 1")
    return float(value)
