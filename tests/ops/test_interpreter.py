"""The quick interpreter of tests/interpreter.py computes what Triton's does, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@pytest.fixture(autouse=True)
def _interpreted(device: str) -> None:
    if device != "cpu":
        pytest.skip("the interpreter runs on the host")


Case = tuple[Any, ...]
"""A kernel, its grid, a function that makes its arguments, and its constants by name."""


def compare(cases: list[Case]) -> None:
    """What is left of the arguments is the same bits without and, each time, with what is quick."""
    import interpreter as quick

    def launched() -> list[list[torch.Tensor]]:
        found = []
        for kernel, grid, make, constants in cases:
            args = make()
            kernel[grid](*args, **constants)
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            found.append([each.view(torch.uint8) for each in tensors])
        return found

    with quick.plain():
        expected = launched()
    for _ in range(3):
        for ours, theirs in zip(launched(), expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other)


@triton.jit
def operators_kernel(x_ptr, y_ptr, out_ptr, flags_ptr, n, SIZE: tl.constexpr):
    program = tl.program_id(0)
    place = program * SIZE + tl.arange(0, SIZE)
    inside = place < n
    x = tl.load(x_ptr + place, mask=inside, other=0)
    y = tl.load(y_ptr + place, mask=inside, other=1)
    total = x + y
    for step in range(3):
        total = total * 2 + x - step
    total = tl.where(x > y, total, -total)
    total += tl.minimum(x, y) * tl.maximum(y, 3) + tl.abs(x)
    tl.store(out_ptr + place, total, mask=inside)
    tl.store(flags_ptr + place, (x <= y) | ((x == 1) & ~(y != x)), mask=inside)


@triton.jit
def integers_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    found = (x // y) ^ (x % y)
    found = (found << 1) | ((x >> 1) & 5)
    tl.store(out_ptr + place, found + (x & 1).to(x.dtype))


@triton.jit
def casts_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x = tl.load(x_ptr + place)
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty))


@triton.jit
def twice(x, times: tl.constexpr):
    return x * times, x - times


@triton.jit
def blocks_kernel(a_ptr, b_ptr, out_ptr, rows_ptr, SIZE: tl.constexpr, GAIN: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + row * SIZE + column)
    b = tl.load(b_ptr + row * SIZE + column)
    acc = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    count = 0
    while count < 3:
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        count += 1
    more, less = twice(acc, GAIN)
    acc = tl.exp(less * 0.01) + more * tl.sum(b.to(tl.float32), axis=1)[:, None]
    tl.store(out_ptr + row * SIZE + column, acc)
    largest = tl.max(acc, axis=0) + tl.argmax(acc, axis=0)
    tl.store(rows_ptr + tl.arange(0, SIZE), largest + tl.cumsum(tl.sum(acc, axis=0), axis=0))
    flat = tl.reshape(acc, [SIZE * SIZE]).to(tl.float16).to(tl.float32)
    tl.store(rows_ptr + SIZE, tl.sum(flat))


@triton.jit
def atomics_kernel(counts_ptr, sums_ptr, order_ptr, SIZE: tl.constexpr):
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    place = tl.arange(0, SIZE)
    tl.atomic_add(sums_ptr + place, place * 0.1 + program, mask=place < program)
    tl.atomic_max(counts_ptr + place, place * program)
    before = tl.atomic_add(counts_ptr + SIZE, 1, sem="acq_rel")
    tl.store(order_ptr + program, before)
    if before == 3:
        tl.store(order_ptr + SIZE, tl.atomic_cas(counts_ptr + SIZE, 4, 40))


@triton.jit
def numbers_kernel(x_ptr, out_ptr, pair, n):
    """Of one number each: whether it is read may be seen in what is read instead."""
    first, second = pair
    for i in range(n):
        other = tl.load(x_ptr + i)
        x = tl.load(x_ptr + i + 1, mask=i < first, other=other)
        if x > second:
            x = x / 2
        tl.store(out_ptr + i, x, mask=i != second)


@triton.jit
def constant_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, VALUE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x = tl.load(x_ptr + place)
    for _ in range(2):
        tl.store(out_ptr + place, tl.where(x > 50, VALUE, x + VALUE))


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint32)
ALL = (*INTEGERS[:5], torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def numbers(dtype: torch.dtype, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 120, [size], generator=generator).to(torch.float64).to(dtype)


def test_operators_of_any_two_types_of_one_shape() -> None:
    from triton.runtime import interpreter

    few = [torch.float32, torch.float16, torch.int32, torch.int64, torch.int8]
    if hasattr(interpreter.InterpreterBuilder, "get_bf16"):  # that of Triton 3.6 has no constants
        few.append(torch.bfloat16)

    def case(one: torch.dtype, other: torch.dtype) -> Case:
        def make() -> list[Any]:
            flags = torch.zeros(24, dtype=torch.bool)
            out = numbers(torch.promote_types(one, other), 24)
            return [numbers(one, 24), numbers(other, 24, 1), out, flags, 21]

        return operators_kernel, (3,), make, {"SIZE": 8}

    compare([case(*each) for each in itertools.combinations_with_replacement(few, 2)])


def test_operators_of_integers() -> None:
    def case(dtype: torch.dtype) -> Case:
        def make() -> list[Any]:
            return [numbers(dtype, 16), numbers(dtype, 16, 1), numbers(dtype, 16)]

        return integers_kernel, (2,), make, {"SIZE": 16}

    compare([case(each) for each in INTEGERS])


def test_casts_from_any_type_to_any() -> None:
    def case(one: torch.dtype, other: torch.dtype) -> Case:
        return casts_kernel, (2,), lambda: [numbers(one, 16), numbers(other, 16)], {"SIZE": 16}

    compare([case(*each) for each in itertools.product(ALL, repeat=2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks(dtype) -> None:
    def make() -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
        return [a, b, torch.zeros(16, 16), torch.zeros(17)]

    compare([(blocks_kernel, (1,), make, {"SIZE": 16, "GAIN": gain}) for gain in (2, 2.0, 3, True)])


def test_constants_that_are_equal_and_not_the_same() -> None:
    def case(dtype: torch.dtype, value: Any) -> Case:
        def make() -> list[Any]:
            return [numbers(dtype, 16), torch.zeros(16)]

        return constant_kernel, (1,), make, {"SIZE": 16, "VALUE": value}

    values = (0.0, -0.0, 0, False, 100, 100.0, 1, True, float("inf"))
    compare([case(*each) for each in itertools.product((torch.float32, torch.int8), values)])


def test_atomics() -> None:
    def make() -> list[Any]:
        return [torch.zeros(9, dtype=torch.int32), torch.zeros(8), torch.zeros(9)]

    compare([(atomics_kernel, (3, 2), make, {"SIZE": 8})])


def test_one_number_each() -> None:
    def case(dtype: torch.dtype) -> Case:
        def make() -> list[Any]:
            x = torch.tensor([-0.0, 0.0, 3.0, -0.0, 5.0], dtype=dtype)
            return [x, torch.full([4], 9.0, dtype=dtype), (2, 1), 4]

        return numbers_kernel, (1,), make, {}

    compare([case(torch.float32), case(torch.float64)])


@triton.jit
def wrong_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) | 1)


def test_what_is_refused_is_refused() -> None:
    import interpreter as quick

    def refusal(dtype: torch.dtype) -> str:
        with pytest.raises(Exception, match="invalid operands") as found:
            wrong_kernel[(1,)](numbers(dtype, 1), numbers(dtype, 1))
        return str(found.value)

    with quick.plain():
        expected = refusal(torch.float32)
    for _ in range(3):
        wrong_kernel[(1,)](numbers(torch.int32, 1), numbers(torch.int32, 1))
        assert refusal(torch.float32) == expected


def test_the_language_is_asked_once(monkeypatch) -> None:
    """For each set of types, and each number."""
    from triton.language.semantic import TritonSemantic

    asked: list[str] = []

    def counted(name: str) -> None:
        function = getattr(TritonSemantic, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append(name)
            return function(self, *args, **kwargs)

        monkeypatch.setattr(TritonSemantic, name, call)

    for each in ("add", "mul", "where", "load", "store", "cast", "bitcast", "scalar_constant"):
        counted(each)

    def launch(dtype: torch.dtype) -> list[str]:
        asked.clear()
        x, out, flags = numbers(dtype, 12), numbers(dtype, 12), numbers(torch.bool, 12)
        operators_kernel[(3,)](x, x, out, flags, 11, SIZE=4)
        return list(asked)

    for dtype in (torch.float32, torch.int16):
        assert launch(dtype)
        assert not launch(dtype)


def test_a_type_is_told_from_every_other() -> None:
    types = [getattr(tl, name) for name in dir(tl) if type(getattr(tl, name)) is tl.dtype]
    types += [tl.pointer_type(each) for each in types]
    types += [tl.pointer_type(tl.int8, const=True), tl.pointer_type(tl.int8, address_space="a")]
    shapes = ([1], [4], [4, 1], [1, 4], [2, 2])
    types += [tl.block_type(each, shape) for each in types for shape in shapes]
    assert len({each._identity for each in types}) == len(types)
    for each in types[20:]:
        if each.is_block():
            again = tl.block_type(each.element_ty, list(each.shape))
        elif each.is_ptr():
            again = tl.pointer_type(each.element_ty, each.address_space, each.const)
        else:
            continue
        assert again is not each
        assert again._identity is each._identity


def test_a_constant_is_written_by_nobody() -> None:
    import interpreter as quick

    made = quick._semantic.to_tensor(5)
    assert made is quick._semantic.to_tensor(5)
    assert quick._semantic.to_tensor(True).dtype is tl.int1
    with pytest.raises(ValueError, match="read-only"):
        made.handle.data += 1


def test_functions_of_the_builder_are_known() -> None:
    """Those of this version of Triton: else they are slow, and somebody should look at them."""
    import interpreter as quick
    from triton.runtime import interpreter

    with quick.plain():
        for each in (
            interpreter._validate_np_data_size, interpreter.TensorHandle.__post_init__,
            interpreter.InterpreterBuilder.binary_op,
        ):  # fmt: skip
            assert quick.known(each)


def test_of_unknown_source_nothing_is_replaced(monkeypatch) -> None:
    import interpreter as quick
    from triton.runtime import interpreter

    quicker = interpreter.InterpreterBuilder.binary_op
    with quick.plain():
        own = interpreter.InterpreterBuilder.binary_op
        monkeypatch.setitem(quick.KNOWN, "binary_op", set())
    assert interpreter.InterpreterBuilder.binary_op is own is not quicker
    monkeypatch.undo()
    with quick.plain():
        pass
    assert interpreter.InterpreterBuilder.binary_op is not own
