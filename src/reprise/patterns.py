"""What xgrammar would read in a regular expression as something else, without a word."""

from __future__ import annotations

from reprise.errors import RequestError

MAX_REPEATS = 10_000
"""Of one part: each is a state of an automaton."""


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
            # A bracket that closes at once is one of the characters.
            place += 1 + (rest[1:2] == "^")
            place += pattern[place : place + 1] == "]"
            continue
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
