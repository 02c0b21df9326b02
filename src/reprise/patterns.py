"""What xgrammar would read in a regular expression as something else, without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator

from reprise.errors import RequestError

MAX_REPEATS = 10_000
"""Of one part: each is a state of an automaton."""
MAX_COUNTED = 128
"""Repetitions of one part of a text in JSON: of more xgrammar forgets that it is in JSON."""

_Codes = list[tuple[int, int]]
"""Of characters, from the first to the last of each range."""

_LAST = 0x10FFFF
_ESCAPED: _Codes = [(0, 31), (34, 34), (92, 92)]
"""What JSON writes as an escape."""
_KINDS: dict[str, _Codes] = {
    "d": [(48, 57)],
    "w": [(48, 57), (65, 90), (95, 95), (97, 122)],
    "s": [(9, 13), (32, 32), (160, 160)],
}
_CONTROLS = {"0": 0, "a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "e": 27}
_LETTERS = frozenset("dDwWsS") | {each for each in _CONTROLS if each.isalpha()}
"""Those that mean something behind a backslash; xgrammar takes others for themselves."""
_ESCAPE = re.compile(
    r"(?s)\\(?:u\{(?P<wide>[0-9a-fA-F]{1,6})\}|u(?P<hex>[0-9a-fA-F]{4})"
    r"|x[0-9a-fA-F]{2}|c[a-zA-Z]|(?P<sign>.))"
)
_DASH = (45, 45)
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?")
_SIGN = r"""(?sx)
    \\ (?: u\{(?P<wide>[0-9a-fA-F]{1,6})\} | (?:u(?=[0-9a-fA-F]{4})|x(?=[0-9a-fA-F]{2}))
            (?P<hex>(?<=u)....|(?<=x)..) | c(?P<control>[a-zA-Z]) | (?P<escape>.) )
"""
_IN_CLASS = re.compile(_SIGN + r"| (?P<one>.)")
_PART = re.compile(
    _SIGN
    + r"""
    | (?P<set> \[ (?P<not>\^?) (?P<body> (?:\\.|[^\]\\])* ) \]? )
    | (?P<open> \( (?: \? (?: : | P?<\w*> )? )? ) | (?P<close> \) )
    | (?P<count> \{(?P<least>\d+)(?:,(?P<most>\d*))?\} )
    | (?P<any> \. ) | (?P<other> [\^$|*+?] ) | (?P<one> . )
    """
)


def check_pattern(pattern: str, where: str) -> None:
    """Refuse what is not matched as it is written.

    Args:
        pattern: It has to match the whole text, so ``^`` and ``$`` may stand at its ends alone.
        where: What it is called in errors.

    Raises:
        RequestError: It names what is not supported.
    """

    def refuse(what: str) -> RequestError:
        return RequestError(f"{where}={pattern[:200]!r}: {what}")

    if "\0" in pattern:
        raise refuse("a character NUL is not supported")
    place, in_class = 0, False
    while place < len(pattern):
        sign, follows = pattern[place], pattern[place + 1 : place + 2]
        if sign == "\\":
            escape = _ESCAPE.match(pattern, place)
            if escape is None:
                raise refuse("a backslash ends it: write \\\\ for the character")
            place = escape.end()
            wrong = _wrong_escape(escape, pattern[place : place + 1], in_class=in_class)
            if wrong is not None:
                raise refuse(wrong)
            continue
        if in_class:
            if sign == "[" and follows == ":":
                raise refuse("classes such as [:alpha:] are not supported: write [a-zA-Z]")
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
            if pattern.startswith(("[]", "[^]"), place):
                raise refuse("a bracket that closes a class at once is read in two ways: write \\]")
        elif pattern.startswith(("(?=", "(?!", "(?<=", "(?<!"), place):
            raise refuse("looking ahead or behind is not supported")
        elif sign == "^" and place and pattern[place - 1] not in "(|":
            raise refuse("^ is supported where the text begins alone; write \\^ for the character")
        elif sign == "$" and follows and follows not in ")|":
            raise refuse("$ is supported where the text ends alone; write \\$ for the character")
        elif found := _COUNT.match(pattern, place):
            for number in found.groups(""):
                if len(number) > 9 or (number and int(number) > MAX_REPEATS):
                    raise refuse(f"{{{number}}} repeats too often: give at most {MAX_REPEATS}")
        place += 1


def _wrong_escape(found: re.Match[str], follows: str, *, in_class: bool) -> str | None:
    """Why the escape, behind which that stands, is not supported; None: it is."""
    sign = found["sign"] or ""
    if sign in ("x", "u", "c"):
        return f"\\{sign} lacks its digits or letter: write \\x41, \\u0041, \\u{{41}} or \\cA"
    if (
        sign.isascii()
        and sign.isalpha()
        and (sign not in _LETTERS or (sign == "b" and not in_class))
    ):
        return f"\\{sign} is not supported: leave it out, the whole text matches"
    if sign and sign in "123456789" and not in_class:
        return f"the backreference \\{sign} is not supported"
    if (sign and sign in "123456789") or (sign == "0" and follows.isdecimal()):
        return f"\\{sign} is read in two ways: write \\x and two digits for a character's number"
    code = int(found["wide"] or found["hex"] or "0", 16)
    if code > _LAST or 0xD800 <= code < 0xE000:
        return f"{found[0]} is no character: write the character itself"
    return None


def check_text_pattern(pattern: str, where: str) -> None:
    """:func:`check_pattern` of a text within JSON, where quotes, backslashes and control characters
    are written as escapes. xgrammar matches none of them; but it matches them bare, and what comes
    is no JSON, where nothing else is left of the expression, or in what it counts beyond
    :data:`MAX_COUNTED`.

    Raises:
        RequestError: It names what is not supported.
    """
    check_pattern(pattern, where)
    loose: list[str | None] = [None]
    """Of the expression and of each group that is open: something in it that may be an escape."""
    last: str | None = None
    """Of what a count would repeat."""
    for found in _PART.finditer(pattern):
        if found["open"]:
            loose.append(None)
        elif found["close"]:
            last = loose.pop() if len(loose) > 1 else None
            loose[-1] = loose[-1] or last
        elif found["count"]:
            if last and max(int(found["least"]), int(found["most"] or 0)) > MAX_COUNTED:
                raise RequestError(
                    f"{where}={pattern[:200]!r}: what is repeated more than {MAX_COUNTED} times "
                    f"may not be a quote, a backslash or a control character, and {last[:200]} "
                    'may: write [^\\x00-\\x1f"\\\\] or the characters that are meant, or give '
                    "maxLength alone"
                )
        elif not found["other"]:
            codes = _codes_of(found)
            last = found[0] if _meet(codes, _ESCAPED) else None
            if last and not _meet(codes, _others(_ESCAPED)):
                raise RequestError(
                    f"{where}={pattern[:200]!r}: {last[:200]} is written as an escape in JSON, "
                    "which is not matched: leave it out"
                )
            loose[-1] = loose[-1] or last


def _codes_of(found: re.Match[str]) -> _Codes:
    """What a part of an expression matches that is one character."""
    if found["any"]:
        return [(0, _LAST)]
    if found["set"]:
        codes = list(_in_class(found["body"]))
        return _others(codes) if found["not"] else codes
    return _one(found)


def _in_class(body: str) -> Iterator[tuple[int, int]]:
    begin: int | None = None
    """Of a range, if the sign before could begin one."""
    dashed = False
    """A dash came behind it."""
    for found in _IN_CLASS.finditer(body):
        if found[0] == "-" and begin is not None and not dashed:
            dashed = True
            continue
        codes = _one(found)
        single = codes[0][0] if len(codes) == 1 and codes[0][0] == codes[0][1] else None
        if dashed and begin is not None and single is not None:
            yield begin, single
            begin = None
        else:
            if dashed:
                yield _DASH
            yield from codes
            begin = single
        dashed = False
    if dashed:
        yield _DASH


def _one(found: re.Match[str]) -> _Codes:
    """What one sign or escape matches."""
    if found["wide"] or found["hex"]:
        code = int(found["wide"] or found["hex"], 16)
    elif found["control"]:
        code = ord(found["control"]) & 31
    elif found["escape"]:
        kind = _KINDS.get(found["escape"].lower())
        if kind is not None:
            return kind if found["escape"].islower() else _others(kind)
        code = _CONTROLS.get(found["escape"], ord(found["escape"]))
    else:
        code = ord(found["one"])
    return [(code, code)]


def _others(codes: _Codes) -> _Codes:
    """All code points that are not these."""
    found, begin = [], 0
    for first, last in sorted(codes):
        if begin < first:
            found.append((begin, first - 1))
        begin = max(begin, last + 1)
    return [*found, (begin, _LAST)] if begin <= _LAST else found


def _meet(codes: _Codes, others: _Codes) -> bool:
    return any(a <= d and c <= b for a, b in codes for c, d in others)
