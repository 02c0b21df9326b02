"""Flags of ``vllm serve`` that ``reprise serve`` has under another name, or no use for.

Lines that start vLLM's server have many of them, most at the value that means "off". What they say
is handed on by name, as ``LLM(...)`` takes it: accepted where it asks for nothing, refused with the
reason elsewhere (:mod:`reprise.vllm_names`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from reprise.cli.command import Command
from reprise.cli.failures import in_flags
from reprise.errors import ConfigError
from reprise.vllm_names import ENGINE, SERVER

HANDED_ON = "--vllm-option"
"""Takes NAME=JSON; no help shows it."""

_OTHER_WORDS = {
    "-tp": "--tensor-parallel-size", "-dp": "--data-parallel-size", "-q": "--quantization",
    "-pp": "--pipeline-parallel-size", "-ep": "--enable-expert-parallel",
    "--disable-uvicorn-access-log": "--no-access-log",
}  # fmt: skip
_SEVERAL = ("--served-model-name", "--api-key")
"""Flags of both that take several values at once with vLLM."""
_ENGINES_WORDS: Mapping[str, tuple[Any, ...]] = {
    "enforce_eager": (False,), "disable_custom_all_reduce": (False,), "num_gpu_blocks_override": (),
}  # fmt: skip
"""What :class:`reprise.config.EngineConfig` knows beside the names of its fields and vLLM's."""


class ServeCommand(Command):
    """A command that takes vLLM's flags beside its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(translated(args, self.takes(ctx))))

    def is_option(self, name: str, takes: Mapping[str, bool]) -> bool:
        plain = name.replace("_", "-")
        return plain in takes or name in _OTHER_WORDS or (
            name.startswith("--") and _field(plain) is not None
        )  # fmt: skip


def translated(arguments: Iterable[str], takes: Mapping[str, bool]) -> Iterator[str]:
    """A command line in the words of the command.

    Args:
        arguments: As they were typed.
        takes: The command's own flags, and whether a value follows.
    """
    left = list(arguments)
    model_first = bool(left) and not left[0].startswith("-")
    while left:
        word = left.pop(0)
        if word == "--":
            yield from (word, *left)
            return
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in takes:
            name = name.replace("_", "-")  # vLLM takes both
        name = _OTHER_WORDS.get(name, name) if name not in takes else name
        if not name.startswith("-") or name in takes:
            yield f"{name}{equals}{value}"
            if takes.get(name) and not equals and left:
                yield left.pop(0)
            # Else what follows may be the model.
            while name in _SEVERAL and model_first and left and not left[0].startswith("-"):
                yield from (name, left.pop(0))
            continue
        found = _field(name)
        if found is None:
            yield word
            continue
        field, neutral, alone = found
        if neutral and all(isinstance(each, bool) for each in neutral):
            if not equals and left and left[0].lower() in ("true", "false"):
                equals, value = "=", left.pop(0)
            said: Any = _read(value.lower()) if equals else alone
        elif equals:
            said = _read(value)
        else:
            most = len(left) if any(isinstance(each, list) for each in neutral) else 1
            values = list(itertools.takewhile(lambda each: not each.startswith("-"), left[:most]))
            del left[: len(values)]
            said = [_read(each) for each in values] if len(values) > 1 else _read("".join(values))
        yield from (HANDED_ON, f"{field}={json.dumps(said)}")


def handed_on(given: Iterable[str]) -> dict[str, Any]:
    """What the values of :data:`HANDED_ON` say, by name."""
    pairs = (each.partition("=") for each in given)
    return {name: _read(value) for name, _, value in pairs}


@contextmanager
def flags_named(given: Iterable[str]) -> Iterator[None]:
    """Errors of the block call these options as they were typed, but for dashes."""
    try:
        yield
    except ConfigError as error:
        flags = {name: "--" + name.replace("_", "-") for name in handed_on(given)}
        raise ConfigError(in_flags(str(error), flags)) from None


def _field(name: str) -> tuple[str, tuple[Any, ...], bool] | None:
    """The field that a flag of vLLM is for, where it asks for nothing, and what the flag alone
    says if it is a switch; None: vLLM has no such flag."""
    field = name.removeprefix("--").replace("-", "_")
    for each, alone in ((field, True), (field.removeprefix("no_"), False)):
        for names in (*(group.neutral for group in (*ENGINE, *SERVER)), _ENGINES_WORDS):
            if each in names:
                return each, names[each], alone
    return None


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
