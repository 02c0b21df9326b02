from collections.abc import Iterator

from reprise.ops.cases import SMALL, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    return [
        {"x": make.randn(rows, 96), "gate": make.randn(rows, 128)[:, -width:]}
        for rows, width in ((1, 96), (9, 96), (1, 1), (9, 1))
    ]


def _workloads(make: Maker) -> Iterator[Workload]:
    size = SMALL.heads * SMALL.head_size
    for tokens in (1, 64, 8192):

        def arguments(tokens: int = tokens) -> Arguments:
            return {"x": make.randn(tokens, size), "gate": make.randn(tokens, size)}

        yield Workload(
            f"{SMALL.name}, T={tokens}",
            arguments,
            read_write=2 * 3 * tokens * size,
            compiled=tokens == 64,
        )


cases = Cases(_small, _workloads)
