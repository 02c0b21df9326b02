"""Grammars for xgrammar's matchers: made in bounded time, kept in bounded memory."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reprise.arguments import shown
from reprise.engine.structured.automaton import Automaton
from reprise.engine.structured.vocabulary import token_infos
from reprise.engine.structured.white_space import WhiteSpace, named_by
from reprise.errors import RequestError, ordinary
from reprise.json_schema import check_schema
from reprise.patterns import check_pattern
from reprise.structured_outputs import StructuredOutputsParams

logger = logging.getLogger(__name__)

SECONDS = 10.0
"""Most time that one grammar takes to compile."""
MAX_COMPILING = 2
"""Grammars that are compiled at once. One that takes too long goes on in its thread, since nothing
can stop it, and counts until it ends."""
MAX_BYTES = 256 << 20
"""Of the grammars that are kept."""
MAX_KEPT = 1024
"""Of them: all are measured when one comes, a microsecond or more each."""
_BOUNDED = ("json", "json_object", "structural_tag")
"""Kinds of text in which white space stands between parts."""
_COUNTED = re.compile(r'(?m)^(\S+_characters(?:_\d+)? ::= )\(\(\[\^\\"\\\\\\r\\n\]\)\)$')
"""xgrammar's rule of a character of a text whose length is bounded."""
_ALONE = re.compile(r"(?m)^(\S+) ::= \(\(([^\s\"\[\](){}|]+)(?:\{\d+, -?\d+\})?\)\)(?: \(=.*)?$")
"""xgrammar's rule that is another one, maybe repeated, and nothing else; and that one."""

_Key = tuple[str, str, bool]


@dataclass(frozen=True)
class Compiled:
    """What a text must be, as requests follow it token by token."""

    grammar: Any
    """xgrammar's compiled grammar."""
    spaces: WhiteSpace | None
    """White space in a row is bounded; None: it is not, or the grammar has none."""
    automaton: Automaton | None
    """Tells where a text stands; None: the grammar has parts that it does not follow."""


class GrammarCompiler:
    """Compiles what requests ask for, and keeps it for others. Any thread may call it.

    Args:
        tokenizer: The engine's; None: it has none.
        vocab_size: Of the logits.
        stop_token_ids: What ends a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._compilers: tuple[_Maker, _Maker, WhiteSpace] | None = None
        """For text without special tokens, and with them; and the tokens of white space."""
        self._kept: OrderedDict[_Key, Compiled] = OrderedDict()
        self._jobs: dict[_Key, _Job] = {}
        """By what they compile; also those that no request waits for any more."""
        self.num_compiled = 0
        """From the start; the others were kept."""

    @property
    def usable(self) -> bool:
        """Whether the model can follow any grammar."""
        return self._tokenizer is not None and bool(self._stop_token_ids)

    def compile(self, wanted: StructuredOutputsParams) -> Compiled:
        """The grammar of what is wanted.

        Raises:
            RequestError: Structured output is not installed or needs a tokenizer; the grammar is
                invalid, asks for what would be ignored, matches nothing, or takes too long.
        """
        key = wanted.kind, wanted.source, wanted.disable_any_whitespace
        self._check(wanted)
        self._loaded()  # the first time takes seconds, which are no grammar's
        deadline = time.monotonic() + SECONDS
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
            job = self._jobs.get(key)
            if job is None:
                if len(self._jobs) >= MAX_COMPILING and not self._room(deadline):
                    raise RequestError(
                        f"structured_outputs.{wanted.kind}: {len(self._jobs)} other grammars have "
                        f"been compiling for {SECONDS:g} s; give one that is simpler, or try again"
                    )
                job = self._jobs[key] = _Job(lambda: self._make(wanted))
                job.start(lambda: self._finished(key, job))
        return job.result(deadline, wanted)

    def _room(self, deadline: float) -> bool:
        """Wait, without the lock, until one more may be compiled."""
        while len(self._jobs) >= MAX_COMPILING:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            jobs = list(self._jobs.values())
            self._lock.release()
            try:
                jobs[0].done.wait(min(left, 0.05))
            finally:
                self._lock.acquire()
        return True

    def _finished(self, key: _Key, job: _Job) -> None:
        with self._lock:
            del self._jobs[key]
            if job.error is None:
                self.num_compiled += 1
                self._kept[key] = job.value
                sizes = [_size(*each) for each in self._kept.items()]
                left = sum(sizes)  # of automata too, which grow as they are used
                for size in sizes[:-1]:
                    if left > MAX_BYTES or len(self._kept) > MAX_KEPT:
                        self._kept.popitem(last=False)
                        left -= size

    def _check(self, wanted: StructuredOutputsParams) -> None:
        """What can be refused without compiling, in time that grows with the text alone."""
        if self._tokenizer is None:
            raise RequestError(
                f"structured_outputs.{wanted.kind} needs a tokenizer, and none is loaded "
                "(skip_tokenizer_init=True)"
            )
        if not self._stop_token_ids:
            raise RequestError(
                f"structured_outputs.{wanted.kind} needs a model with an end-of-sequence token: "
                "its config and tokenizer name none"
            )
        if wanted.kind == "json":
            check_schema(json.loads(wanted.source), "structured_outputs.json")
        elif wanted.kind == "regex":
            check_pattern(wanted.source, "structured_outputs.regex")
        elif wanted.kind == "structural_tag":
            _check_tag(json.loads(wanted.source), 0)

    def _make(self, wanted: StructuredOutputsParams) -> Compiled:
        began = time.perf_counter()
        plain, tagged, white_space = self._loaded()
        maker = tagged if wanted.kind == "structural_tag" else plain
        compiler = maker.compiler
        free = not wanted.disable_any_whitespace
        source = wanted.source
        makers: Mapping[str, Callable[[], Any]] = {
            "json": lambda: compiler.compile_grammar(_of_schema(source, any_whitespace=free)),
            "json_object": lambda: compiler.compile_json_schema(
                '{"type": "object"}', any_whitespace=free
            ),
            "regex": lambda: compiler.compile_regex(source),
            "choice": lambda: compiler.compile_grammar(_one_of(wanted.choice or [])),
            "grammar": lambda: compiler.compile_grammar(_of_ebnf(source)),
            "structural_tag": lambda: compiler.compile_grammar(_of_tag(json.loads(source))),
        }
        compiled = makers[wanted.kind]()
        self._try(compiled, wanted)
        seconds = time.perf_counter() - began
        logger.info(
            "grammar of structured_outputs.%s compiled in %.3f s, %d bytes: %s",
            wanted.kind, seconds, compiled.memory_size_bytes, shown(source, 80),
        )  # fmt: skip
        bounded = free and wanted.kind in _BOUNDED
        if bounded and wanted.kind != "json_object":
            bounded = not named_by(json.loads(source))
        automaton = Automaton.of(compiled, maker.texts, self._stop_token_ids)
        return Compiled(compiled, white_space if bounded else None, automaton)

    def _try(self, compiled: Any, wanted: StructuredOutputsParams) -> None:
        """Refuse a grammar by which no token can come first."""
        import torch
        import xgrammar

        matcher = xgrammar.GrammarMatcher(compiled)
        bits = torch.full((1, -(-self._vocab_size // 32)), -1, dtype=torch.int32)
        matcher.fill_next_token_bitmask(bits, 0)
        if not bits.any():
            raise RequestError(
                f"structured_outputs.{wanted.kind}={shown(wanted.source)}: no text can be made of "
                "the model's tokens that matches it"
            )

    def _loaded(self) -> tuple[_Maker, _Maker, WhiteSpace]:
        with self._making:
            if self._compilers is None:
                began = time.perf_counter()
                infos = token_infos(self._tokenizer, self._vocab_size, self._stop_token_ids)
                import xgrammar

                # Kept here and not there: a grammar that was given up would count there too.
                plain, tagged = (
                    _Maker(
                        xgrammar.GrammarCompiler(each, max_threads=1, cache_enabled=False),
                        each.decoded_vocab,
                    )
                    for each in infos
                )
                self._compilers = plain, tagged, WhiteSpace.of(plain.texts)
                logger.info(
                    "structured output is ready after %.2f s: the first request asks for it",
                    time.perf_counter() - began,
                )
            return self._compilers


@dataclass(frozen=True)
class _Maker:
    """Makes grammars."""

    compiler: Any
    """xgrammar's."""
    texts: Sequence[bytes]
    """Of tokens, empty of those that are no text."""


class _Job:
    """One grammar that is compiled in a thread of its own, which the process does not wait for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.done = threading.Event()
        self.value: Any = None
        self.error: Exception | None = None

    def start(self, finished: Callable[[], None]) -> None:
        def run() -> None:
            try:
                self.value = self._make()
            except BaseException as error:
                self.error = ordinary(error)
            finally:
                finished()
                self.done.set()

        threading.Thread(target=run, name="reprise-grammar", daemon=True).start()

    def result(self, deadline: float, wanted: StructuredOutputsParams) -> Any:
        named = f"structured_outputs.{wanted.kind}={shown(wanted.source)}"
        if not self.done.wait(max(0.0, deadline - time.monotonic())):
            logger.warning("%s takes more than %g s to compile: refused", named, SECONDS)
            raise RequestError(
                f"{named}: it takes more than {SECONDS:g} s to compile; give one with fewer or "
                "shorter repetitions"
            )
        if isinstance(self.error, RequestError):
            raise self.error
        if self.error is not None:
            raise RequestError(f"{named}: {_message(self.error)}") from self.error
        return self.value


def _size(key: _Key, compiled: Compiled) -> int:
    automaton = compiled.automaton
    known = 0 if automaton is None else automaton.num_bytes
    return int(compiled.grammar.memory_size_bytes) + known + 2 * len(key[1])


def _message(error: Exception) -> str:
    """xgrammar's, without the place in its source."""
    text = str(error).strip()
    if text.startswith("[") and ": " in text:
        text = text.split(": ", 1)[1]
    return shown(text, 500).strip("\"'")


def _one_of(texts: list[str]) -> str:
    """EBNF whose root is one of the texts."""
    return "root ::= " + " | ".join(json.dumps(each, ensure_ascii=False) for each in texts)


def _of_schema(source: str, *, any_whitespace: bool) -> Any:
    import xgrammar

    return _whole_json(xgrammar.Grammar.from_json_schema(source, any_whitespace=any_whitespace))


def _of_ebnf(source: str) -> Any:
    import xgrammar

    return _made_of_more(xgrammar.Grammar.from_ebnf(source))


def _of_tag(tag: Any) -> Any:
    import xgrammar

    return _whole_json(_made_of_more(xgrammar.Grammar.from_structural_tag(tag)))


def _made_of_more(grammar: Any) -> Any:
    """A grammar none of whose rules is itself, maybe repeated, and nothing else: compiling
    ``x ::= x{2}`` ends the process.

    Raises:
        ValueError: One is.
    """
    left = dict(_ALONE.findall(str(grammar)))
    while left:
        rule, passed = next(iter(left)), set()
        while rule in left:
            passed.add(rule)
            rule = left.pop(rule)
        if rule in passed:
            raise ValueError(f"rule {rule} is itself and nothing else, so that no text matches it")
    return grammar


def _whole_json(grammar: Any) -> Any:
    """A grammar whose texts of bounded length have no bare control character: xgrammar allows all
    of them but the ends of lines, and what comes is no JSON."""
    text, count = _COUNTED.subn(r"\1(([^\\0-\\x1f\"\\\\]))", str(grammar))
    return text if count else grammar


def _check_tag(tag: Any, depth: int) -> None:
    """The schemas and expressions in a structural tag."""
    if depth > 64:
        raise RequestError("structured_outputs.structural_tag is nested more than 64 deep")
    where = "structured_outputs.structural_tag"
    if isinstance(tag, list):
        for each in tag:
            _check_tag(each, depth + 1)
    elif isinstance(tag, Mapping):
        for name, each in tag.items():
            if name in ("json_schema", "schema") and isinstance(each, Mapping | bool):
                check_schema(each, f"{where}.{name}")
            elif name == "pattern" and isinstance(each, str):
                check_pattern(each, f"{where}.pattern")
            else:
                _check_tag(each, depth + 1)
