from torch import Tensor

from reprise.distributed import ECHO
from reprise.ops.cases import Arguments, Cases, Maker

TOP = 2
COUNT = 4


def _dispatch(make: Maker) -> list[Arguments]:
    """Of a group whose ranks are all this one, with the same experts: others are processes, which
    their tests start. Each row has an expert here, for what is not sent is not defined."""
    return [
        {
            "x": make.randn(tokens, 96),
            "weights": make.randn(tokens, TOP, dtype=make.floats(0).dtype),
            "ids": _ids(make, tokens, first), "first": first, "count": COUNT, "stride": 0,
            "rows": make.randn(ECHO.size * tokens, 96),
            "rows_weights": make.floats(*[0.0] * (ECHO.size * tokens * TOP)).view(-1, TOP),
            "rows_ids": make.randint(9, ECHO.size * tokens, TOP).int(),
            "group": ECHO.name,
        }
        for tokens, first in ((1, 0), (5, 4))
    ]  # fmt: skip


def _combine(make: Maker) -> list[Arguments]:
    return [
        {
            "y": make.randn(ECHO.size * tokens, 96),
            "rows_ids": (ids - first).clamp(-1, COUNT - 1).repeat(ECHO.size, 1),
            "ids": ids, "first": first, "count": COUNT, "stride": 0,
            "out": make.randn(tokens, 96),
            "group": ECHO.name,
        }
        for tokens, first in ((1, 0), (5, 4))
        for ids in [_ids(make, tokens, first)]
    ]  # fmt: skip


def _ids(make: Maker, tokens: int, first: int) -> Tensor:
    """Of each row one expert here, and one of another rank's or none."""
    ids = make.randint(COUNT, tokens, TOP).int() + first
    ids[:, 1] = -1
    return ids


dispatch_cases = Cases(_dispatch)
combine_cases = Cases(_combine)
