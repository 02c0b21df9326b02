from reprise.distributed import ECHO
from reprise.ops.cases import Arguments, Cases, Maker


def _small(make: Maker) -> list[Arguments]:
    """Of a group whose ranks are all this one: others are processes, which their tests start."""
    return [{"x": make.randn(rows, 96), "group": ECHO.name} for rows in (1, 5)]


def _add(make: Maker) -> list[Arguments]:
    return [
        {"partial": make.randn(rows, 96), "residual": make.randn(rows, 96), "group": ECHO.name}
        for rows in (1, 5)
    ]


cases = Cases(_small)
add_cases = Cases(_add)
