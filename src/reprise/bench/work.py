"""Which requests a server gets from ``bench serve``, and when."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reprise.arguments import is_whole, shown
from reprise.bench.endpoint import Prompt
from reprise.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
"""As vLLM calls them: time to the first token, mean time of each further one, time between chunks,
time to the end."""
WORDS = [
    "the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with",
    "his", "they", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but",
    "what", "all", "were", "when", "we", "there", "can", "an", "your", "which", "their", "said",
    "if", "do", "will", "each", "about", "how",
]  # fmt: skip
"""Each is one token of most vocabularies."""
_FIELDS = ("prompt", "messages", "output_tokens")


@dataclass(frozen=True)
class ServeWork:
    """Which requests arrive when."""

    num_prompts: int | None = None
    """None: 200, or as many as ``dataset`` has."""
    input_len_range: tuple[int, int] = (100, 1024)
    output_len_range: tuple[int, int] = (100, 1024)
    burstiness: float = 1.0
    """Shape of the gamma distribution of the times between arrivals: 1 is Poisson's process, less
    has more bursts."""
    max_concurrency: int | None = None
    """Requests under way; further ones wait here."""
    vocab_size: int = 256
    """Prompts of token ids are drawn below it."""
    goodput: Mapping[str, float] = field(default_factory=dict)
    """Of some of ``METRICS``, the most milliseconds that a request may take to be a good one."""
    percentiles: tuple[float, ...] = (50, 90, 99)
    seed: int = 0
    dataset: Path | None = None
    """Prompts in place of random ones: JSON objects, one a line, with ``prompt`` (text or token
    ids) or ``messages`` (for chats), and maybe ``output_tokens`` in place of a drawn number. If
    more are asked for it begins anew."""

    def check(self, rates: Sequence[float | None]) -> None:
        """
        Raises:
            ConfigError: A number is out of range.
        """
        for name, value in (
            ("burstiness", self.burstiness),
            *(("request_rate", each) for each in rates),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value!r} must be above 0, and finite")
        for name, most in self.goodput.items():
            if name not in METRICS or name == "itl" or not most > 0:
                known = ", ".join(each for each in METRICS if each != "itl")
                raise ConfigError(f"goodput={name}:{most:g} must be milliseconds of one of {known}")
        for each in self.percentiles:
            if not 0 <= each <= 100:
                raise ConfigError(f"percentiles={each:g} must be from 0 to 100")


def make_prompts(work: ServeWork, chat: bool) -> list[Prompt]:
    """The prompts of the data set, or random ones: token ids, which are exactly so many, or for
    chats words.

    Raises:
        ConfigError: A line of the data set is no such prompt.
        OSError: It cannot be read.
    """
    draw = random.Random(work.seed)
    if work.dataset is not None:
        found = _read(work.dataset, chat)
        count = len(found) if work.num_prompts is None else work.num_prompts
        wanted = [found[number % len(found)] for number in range(count)]
        return [
            Prompt(text, draw.randint(*work.output_len_range) if length is None else length)
            for text, length in wanted
        ]
    prompts = []
    for _ in range(200 if work.num_prompts is None else work.num_prompts):
        length = draw.randint(*work.input_len_range)
        text: str | list[int]
        if chat:
            text = " ".join(draw.choices(WORDS, k=length))
        else:
            text = [draw.randrange(work.vocab_size) for _ in range(length)]
        prompts.append(Prompt(text, draw.randint(*work.output_len_range)))
    return prompts


def _read(file: Path, chat: bool) -> list[tuple[Any, int | None]]:
    """Prompt and length of each line."""
    found: list[tuple[Any, int | None]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        place = f"dataset={str(file)!r}, line {number}"
        try:
            given = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place} is no JSON: {error}") from None
        unknown = (
            [] if not isinstance(given, dict) else [each for each in given if each not in _FIELDS]
        )
        if not isinstance(given, dict) or unknown:
            about = f" has {shown(unknown[0])}" if unknown else " is no object"
            raise ConfigError(f"{place}{about}: give objects with {', '.join(_FIELDS)}")
        texts = [given[name] for name in ("prompt", "messages") if name in given]
        if len(texts) != 1 or not _is_prompt(texts[0], "messages" in given, chat):
            kinds = "prompt, a text, or messages, a list" if chat else "prompt, a text or token ids"
            raise ConfigError(f"{place}: give {kinds}{'' if chat else ' (messages: --chat)'}")
        length = given.get("output_tokens")
        if length is not None and (not is_whole(length) or length < 1):
            raise ConfigError(
                f"{place}: output_tokens={shown(length)} must be a whole number above 0"
            )
        found.append((texts[0], length))
    if not found:
        raise ConfigError(f"dataset={str(file)!r} has no prompts")
    return found


def _is_prompt(value: Any, messages: bool, chat: bool) -> bool:
    if messages:
        return chat and isinstance(value, list) and all(isinstance(each, dict) for each in value)
    if isinstance(value, str):
        return bool(value)
    ids = isinstance(value, list) and bool(value) and all(map(is_whole, value))
    return ids and not chat


def arrivals(work: ServeWork, count: int, rate: float | None) -> list[float]:
    """Seconds from the start at which ``count`` requests arrive, the first one at once; None: all
    do."""
    if rate is None:
        return [0.0] * count
    draw, shape = random.Random(f"arrivals {work.seed}"), work.burstiness
    found = [0.0]
    while len(found) < count:
        found.append(found[-1] + draw.gammavariate(shape, 1 / (shape * rate)))
    return found
