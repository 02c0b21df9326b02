from collections.abc import Iterator

from reprise.ops.cases import SMALL, Arguments, Cases, Maker, Workload


def _small(make: Maker) -> list[Arguments]:
    return [{"x": make.randn(rows, 192)} for rows in (1, 9)]


def _workloads(make: Maker) -> Iterator[Workload]:
    for model in make.models:
        for tokens in (1, 64, 8192):
            size = model.intermediate

            def arguments(tokens: int = tokens, size: int = size) -> Arguments:
                return {"x": make.randn(tokens, 2 * size)}

            yield Workload(
                f"{model.name}, T={tokens}",
                arguments,
                read_write=2 * 3 * tokens * size,
                compiled=model is SMALL and tokens <= 64,
            )


cases = Cases(_small, _workloads)
