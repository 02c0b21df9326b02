"""What xgrammar would read in a regular expression as something else, without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator

from reprise.errors import RequestError

MAX_REPEATS = 10_000
"""Of one part: each is a state of an automaton."""
MAX_COUNTED = 128
"""Repetitions of one part of a text in JSON: of more xgrammar forgets that it is in JSON."""
_ESCAPED = '"\\' + "".join(map(chr, range(32)))
"""What JSON writes as an escape."""
_PLAIN = "".join({*map(chr, range(32, 127))} - {*_ESCAPED}) + "ü中😀"
_ATOM = re.compile(
    r"""(?sx)
    (?P<atom> \\u\{[^}]*\} | \\u[0-9a-fA-F]{4} | \\x[0-9a-fA-F]{2} | \\c. | \\.
            | \[(?:\\.|[^\]\\])*\] | [^()|*+?^${\[\\] )
    | \{\d+(?:,\d*)?\} | .
    """
)
_COUNT = re.compile(r"(?<!\\)\{(\d+)(?:,(\d*))?\}")
_IN_CLASS = re.compile(r"(?s)\\.|[\[&~|]")


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
        rest = pattern[place:]
        if rest[0] == "\\":
            if len(rest) > 1 and rest[1] in "AzZGbBkKpPQEX" and not (in_class and rest[1] == "b"):
                raise refuse(f"\\{rest[1]} is not supported: leave it out, the whole text matches")
            if len(rest) > 1 and rest[1] in "123456789" and not in_class:
                raise refuse(f"the backreference \\{rest[1]} is not supported")
            place += 2
            continue
        if in_class:
            if rest.startswith("[:"):
                raise refuse("classes such as [:alpha:] are not supported: write [a-zA-Z]")
            in_class = rest[0] != "]"
        elif rest[0] == "[":
            in_class = True
            if re.match(r"\[\^?\]", rest):
                raise refuse("a bracket that closes a class at once is read in two ways: write \\]")
        elif rest.startswith(("(?=", "(?!", "(?<=", "(?<!")):
            raise refuse("looking ahead or behind is not supported")
        elif rest[0] == "^" and place and pattern[place - 1] not in "(|":
            raise refuse("^ is supported where the text begins alone; write \\^ for the character")
        elif rest[0] == "$" and len(rest) > 1 and rest[1] not in ")|":
            raise refuse("$ is supported where the text ends alone; write \\$ for the character")
        elif rest[0] == "{":
            for number in rest[1 : rest.find("}")].split(","):
                if number.isdecimal() and (len(number) > 9 or int(number) > MAX_REPEATS):
                    raise refuse(f"{{{number}}} repeats too often: give at most {MAX_REPEATS}")
        place += 1


def check_text_pattern(pattern: str, where: str) -> None:
    """:func:`check_pattern` of a text within JSON, where quotes, backslashes and control characters
    are written as escapes. xgrammar matches none of them; but it matches them bare, and what comes
    is no JSON, where nothing else is left of the expression, or where it counts beyond
    :data:`MAX_COUNTED`.

    Raises:
        RequestError: It names what is not supported.
    """
    check_pattern(pattern, where)
    atoms = list(_atoms(pattern))
    loose = [each for each in atoms if any(_matches(each, sign) for sign in _ESCAPED)]
    for each in loose:
        if not any(_matches(each, sign) for sign in _PLAIN):
            raise RequestError(
                f"{where}={pattern[:200]!r}: {each} is written as an escape in JSON, which is not "
                "matched: leave it out"
            )
    counts = [int(each) for pair in _COUNT.findall(pattern) for each in pair if each]
    if loose and max(counts, default=0) > MAX_COUNTED:
        raise RequestError(
            f"{where}={pattern[:200]!r}: what is repeated more than {MAX_COUNTED} times may not be "
            f"a quote, a backslash or a control character, and {loose[0]} may: write "
            '[^\\x00-\\x1f"\\\\] or the characters that are meant, or give maxLength alone'
        )


def _atoms(pattern: str) -> Iterator[str]:
    """What of an expression matches one character."""
    place = 0
    while place < len(pattern):
        found = _ATOM.match(pattern, place)
        assert found is not None  # anything is one
        place = found.end()
        if found["atom"] is not None:
            yield found["atom"]


def _matches(atom: str, sign: str) -> bool:
    """Whether an atom matches a character; yes where Python does not know it."""
    if atom.startswith("\\c"):
        return sign == chr(ord(atom[2]) & 31)
    if atom[0] == "[":  # of the others Python warns
        atom = f"[{re.sub(_IN_CLASS, _escaped, atom[1:-1])}]"
    try:
        return re.fullmatch(atom, sign) is not None
    except re.error:
        return True


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0][0] == "\\" else f"\\{found[0]}"
