from collections.abc import Iterator

from reprise.ops.cases import LARGE, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    return [{"logits": make.randn(rows, 5000)} for rows in (1, 9)]


def _workloads(make: Maker) -> Iterator[Workload]:
    for rows in (1, 64, 256):

        def arguments(rows: int = rows) -> Arguments:
            return {"logits": make.randn(rows, LARGE.vocab)}

        yield Workload(
            f"R={rows}",
            arguments,
            read_write=2 * rows * LARGE.vocab,
            exact=True,
            compiled=rows <= 64,
        )


cases = Cases(_small, _workloads)
