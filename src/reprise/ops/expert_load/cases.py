from reprise.ops.cases import Arguments, Cases, Maker


def _small(make: Maker) -> list[Arguments]:
    """Padding, numbers of no expert, and rows that all want the same."""
    return [
        {"ids": make.randint(12, rows, 3).int() - 2, "counts": make.randint(1000, experts)}
        for rows, experts in ((1, 8), (40, 8), (7, 1))
    ]


cases = Cases(_small)
