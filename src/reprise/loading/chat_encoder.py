"""The texts of a checkpoint's own chat encoder: a Python file, which is read and never run.

DeepSeek-V4 ships no Jinja template but ``encoding/encoding_dsv4.py``. Its long texts are what a
model was trained on, to the letter, so they are taken from there; how they are put together is
:mod:`reprise.engine.deepseek_v4_chat`.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprise.loading.files import read_object, require_regular

FILE = Path("encoding", "encoding_dsv4.py")
_MOST_BYTES = 1 << 18
"""Of the file: the released ones have 30 KB."""
_TOOLS, _FORMAT = "TOOLS_TEMPLATE", "response_format_template"
_EFFORT, _EFFORTS, _DEFAULT = (
    "REASONING_EFFORT_MAX", "REASONING_EFFORT_PROMPTS", "DEFAULT_REASONING_EFFORT",
)  # fmt: skip
_NAMES = (_TOOLS, _FORMAT, _EFFORT, _EFFORTS, _DEFAULT)
_FIELDS = {
    _TOOLS: ("tool_schemas", {"dsml_token", "thinking_start_token", "thinking_end_token"}),
    _FORMAT: ("schema", set()),
}
"""Of templates: the field that each must have, and those that it may have."""


@dataclass(frozen=True)
class Template:
    """A text with named places."""

    name: str
    pieces: tuple[tuple[str, str | None], ...]
    """Each a text, and the name of the place behind it."""

    def fill(self, **values: str) -> str:
        """The text with these in its places; what they hold is not looked at."""
        return "".join(text + ("" if at is None else values[at]) for text, at in self.pieces)


@dataclass(frozen=True)
class EncoderTexts:
    """What an encoder file says; None: it does not, or there is none."""

    tools: Template | None = None
    response_format: Template | None = None
    efforts: tuple[tuple[str, str], ...] | None = None
    """Names of efforts, the least first, and what each puts before a conversation."""
    default_effort: str | None = None


def encoder_texts(path: Path) -> EncoderTexts | None:
    """The texts of a checkpoint's directory; None: its conversations are not encoded so.

    Raises:
        ValueError: The file is not what encoder files are.
        OSError: It cannot be read.
    """
    file = path / FILE
    if file.exists():
        try:
            return _read(file)
        except ValueError as error:
            raise ValueError(f"{FILE}: {error}") from error
    config = path / "config.json"
    if config.is_file() and read_object(config).get("model_type") == "deepseek_v4":
        return EncoderTexts()
    return None


def _read(file: Path) -> EncoderTexts:
    require_regular(file)
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes, more than {_MOST_BYTES}")
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise ValueError(f"it is no Python ({type(error).__name__})") from error
    found = _literals(tree)
    return EncoderTexts(
        _template(_TOOLS, found.get(_TOOLS)),
        _template(_FORMAT, found.get(_FORMAT)),
        *_efforts(found),
    )


def _literals(tree: ast.Module) -> dict[str, Any]:
    """The values of the names that matter, which the file must say as literals, once."""
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id in _NAMES:
                if not isinstance(statement.value, ast.Constant | ast.Dict):
                    raise ValueError(f"{target.id} must be a literal")
                try:
                    found[target.id] = ast.literal_eval(statement.value)
                except (ValueError, TypeError, RecursionError) as error:
                    raise ValueError(f"{target.id} must be a literal") from error
    # A second assignment, wherever it stands, would make the value a question of what runs.
    stored = [
        each.id
        for each in ast.walk(tree)
        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load) and each.id in _NAMES
    ]
    for name in stored:
        if name not in found or stored.count(name) > 1:
            raise ValueError(f"{name} must be assigned once, and outside of everything else")
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character") from error
    return value


def _template(name: str, value: Any) -> Template | None:
    if value is None:
        return None
    needed, allowed = _FIELDS[name]
    try:
        pieces = list(string.Formatter().parse(_text(name, value)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for _, field, form, conversion in pieces:
        # Anything but a name could look into objects, or ask for any width.
        if field is not None and (field not in {needed, *allowed} or form or conversion):
            raise ValueError(f"{name} has the place {{{field}}}, which is not known")
    if [field for _, field, _, _ in pieces].count(needed) != 1:
        raise ValueError(f"{name} must have the place {{{needed}}} once")
    return Template(name, tuple((text, field) for text, field, _, _ in pieces))


def _efforts(
    found: Mapping[str, Any],
) -> tuple[tuple[tuple[str, str], ...] | None, str | None]:
    """Efforts and the default one. The first releases have one text, for the highest of two; later
    ones have a table, in which that text belongs to the middle one of three."""
    table = found.get(_EFFORTS)
    if table is None:
        if found.get(_EFFORT) is None:
            return None, None
        return (("high", ""), ("max", _text(_EFFORT, found[_EFFORT]))), "high"
    if not isinstance(table, dict) or set(table) != {"low", "high", "max"}:
        raise ValueError(f"{_EFFORTS} must have 'low', 'high' and 'max'")
    default = found.get(_DEFAULT, "low")
    if default not in table:
        raise ValueError(f"{_DEFAULT}={default!r} must be one of {_EFFORTS}")
    return (
        tuple((name, _text(_EFFORTS, table[name])) for name in ("low", "high", "max")),
        default,
    )
