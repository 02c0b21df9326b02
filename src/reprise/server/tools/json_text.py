"""JSON as models write it, which need not be what Python takes for it, or can be sent."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")


def read(text: str) -> Any:
    """The value.

    Raises:
        ValueError: It is no JSON, has a number that no client could hold, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def written(value: Any) -> str:
    """JSON of what was read, in characters that UTF-8 has: halves of surrogate pairs, which a text
    in JSON may name, stay escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return _HALF.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large")
    return number
