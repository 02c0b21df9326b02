from reprise.distributed import ECHO
from reprise.ops.cases import Arguments, Cases, Maker


def _small(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(rows, 96), "out": make.randn(rows, columns), "group": ECHO.name}
        for rows, columns in ((1, 192), (5, 180))
    ]


cases = Cases(_small)
