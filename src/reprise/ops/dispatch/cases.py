from reprise.distributed import ECHO
from reprise.ops.cases import Arguments, Cases, Maker

TOP = 2


def _dispatch(make: Maker) -> list[Arguments]:
    """Of a group whose ranks are all this one: others are processes, which their tests start."""
    return [
        {
            "x": make.randn(tokens, 96),
            "weights": make.randn(tokens, TOP, dtype=make.floats(0).dtype),
            "ids": make.randint(9, tokens, TOP).int() - 1,
            "first": first, "count": 4,
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
            "ids": make.randint(9, tokens, TOP).int() - 1,
            "out": make.randn(tokens, 96),
            "group": ECHO.name,
        }
        for tokens in (1, 5)
    ]


dispatch_cases = Cases(_dispatch)
combine_cases = Cases(_combine)
