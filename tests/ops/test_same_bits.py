"""The device's library for products of many rows: where it gives the bits of our kernel, and only
there. Libraries are made up here; which bits a device's own has is for a device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from reprise.ops import OpTable
from reprise.ops.linear import same_bits, shared_sums_kernel, triton_invariant
from reprise.ops.rehearsal import rehearsal
from reprise.platforms import Platform
from reprise.platforms.cpu import CpuPlatform

Library = Callable[[Tensor, Tensor, bool, Tensor | None], Tensor]
ROWS, OUTPUTS, INPUTS = 70, 80, 320


KINDS = ("plain", "gated", "added")


def ours(x: Tensor, weight: Tensor, gated: bool = False, residual: Tensor | None = None) -> Tensor:
    out = x.new_empty(len(x), len(weight) // (2 if gated else 1)) if residual is None else residual
    added = residual is not None
    shared_sums_kernel.launch_product(x, weight, None, out, gated=gated, add=added)
    return out


def compute(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """By the op's implementation."""
    if kind == "added":
        residual = aligned(len(x), len(weight), 2)
        triton_invariant.linear_add(x, weight, bias, residual)
        return residual
    function = triton_invariant.gated_linear if kind == "gated" else triton_invariant.linear
    return function(x, weight, bias)


def expected(kind: str, x: Tensor, weight: Tensor) -> Tensor:
    """By our kernel."""
    residual = aligned(len(x), len(weight), 2) if kind == "added" else None
    return ours(x, weight, kind == "gated", residual)


class Device(CpuPlatform):
    """Whose library chooses by shapes."""

    settings: tuple[Hashable, ...] | None = ()

    def product_settings(self) -> tuple[Hashable, ...] | None:
        return self.settings


class Calls:
    """A library, and what it was asked for."""

    def __init__(self, library: Library) -> None:
        self.library, self.rows = library, list[int]()

    def __call__(
        self, x: Tensor, weight: Tensor, *, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        self.rows.append(len(x))
        return self.library(x, weight, gated, residual)


@pytest.fixture
def use(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Library], Calls]]:
    """Makes one the device's."""
    if device != "cpu":
        pytest.skip("a device has its own")
    monkeypatch.setattr(same_bits, "_answers", {})
    monkeypatch.setattr(same_bits, "_told", set())
    monkeypatch.setattr(same_bits, "_DIFFERENT", 32)  # which divides neither rows nor outputs
    monkeypatch.setattr(same_bits, "_FEWEST_WEIGHTS", OUTPUTS * INPUTS)

    def used(library: Library) -> Calls:
        calls = Calls(library)
        for module in (same_bits, triton_invariant):
            monkeypatch.setattr(module, "by_library", calls)
        return calls

    with OpTable(Device()).activate():
        yield used


def aligned(rows: int, columns: int, seed: int = 0) -> Tensor:
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    memory = torch.zeros(numbers.numel() + 256, dtype=numbers.dtype)
    begin = -memory.data_ptr() % 256 // 2
    found = memory[begin : begin + numbers.numel()].view(rows, columns)
    return found.copy_(numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_one_with_the_same_bits_computes_what_was_rehearsed(
    use: Callable[[Library], Calls], kind: str
) -> None:
    calls = use(ours)
    x, weight = aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS, 1)
    wanted = expected(kind, x, weight)
    assert torch.equal(compute(kind, x, weight), wanted)
    assert not calls.rows, "nobody compares while requests wait"
    with rehearsal():
        assert torch.equal(compute(kind, x, weight), wanted)
    assert calls.rows == [ROWS, ROWS], "compared, and then used"
    assert torch.equal(compute(kind, x, weight), wanted)
    with rehearsal():
        compute(kind, x, weight)
    assert calls.rows == [ROWS] * 4, "compared once"
    compute(kind, x[:69], weight)
    assert calls.rows == [ROWS] * 4, "another number of rows is another question"
    compute(kind, x, weight, torch.zeros(OUTPUTS, dtype=x.dtype))
    assert calls.rows == [ROWS] * 4, "a library adds a bias in its own way"
    for other in KINDS:
        compute(other, x, weight)
    assert calls.rows == [ROWS] * 5, "what comes behind a product is part of it"


def test_few_rows_and_small_or_large_weights_are_ours(
    use: Callable[[Library], Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(ours)
    with rehearsal():
        compute("plain", aligned(64, INPUTS), aligned(OUTPUTS, INPUTS))
        compute("plain", aligned(ROWS, INPUTS), aligned(OUTPUTS - 1, INPUTS))
        compute("plain", aligned(ROWS, INPUTS).float(), aligned(OUTPUTS, INPUTS).float())
        wide = aligned(ROWS, OUTPUTS).float()
        triton_invariant.linear_add(aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS), None, wide)
        monkeypatch.setattr(same_bits, "_MOST_WEIGHTS", OUTPUTS * INPUTS)
        compute("plain", aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS))
    assert not calls.rows


def another_order(*given: Any) -> Tensor:
    """The same products, those of the second half of the inputs first."""
    x, weight, *rest = given
    return ours(x.roll(INPUTS // 2, 1), weight.roll(INPUTS // 2, 1), *rest)


def two_sums(x: Tensor, weight: Tensor, gated: bool, residual: Tensor | None) -> Tensor:
    """As some kernels share the inputs out."""
    half = INPUTS // 2
    sums = (
        x[:, each].float() @ weight[:, each].float().t()
        for each in (slice(half), slice(half, None))
    )
    total = sum(sums, torch.zeros(len(x), len(weight)))
    if residual is not None:
        return residual.copy_((total + residual.float()).to(x.dtype))
    return same_bits.silu_and_mul(total.to(x.dtype)) if gated else total.to(x.dtype)


def one_other_bit(*given: Any) -> Tensor:
    found = ours(*given)
    found[-1, -1:].view(torch.int16).bitwise_xor_(1)
    return found


def last_row(*given: Any) -> Tensor:
    found = ours(*given)
    found[-1] = found[-2]
    return found


def zeros(*given: Any) -> Tensor:
    return ours(*given).zero_()


@pytest.mark.parametrize("library", [another_order, two_sums, one_other_bit, last_row, zeros])
@pytest.mark.parametrize("kind", KINDS)
def test_one_with_other_bits_computes_nothing(
    use: Callable[[Library], Calls], library: Library, kind: str
) -> None:
    calls = use(library)
    x, weight = aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS, 1)
    with rehearsal():
        for _ in range(2):
            assert torch.equal(compute(kind, x, weight), expected(kind, x, weight))
    assert calls.rows == [ROWS], "compared once"


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_sums_otherwise_for_one_number_of_rows_computes_the_others(
    use: Callable[[Library], Calls], kind: str
) -> None:
    def library(*given: Any) -> Tensor:
        return (two_sums if len(given[0]) == 72 else ours)(*given)

    calls = use(library)
    x, weight = aligned(74, INPUTS), aligned(OUTPUTS, INPUTS, 1)
    with rehearsal():
        for rows in (70, 72, 74):
            compute(kind, x[:rows], weight)
    calls.rows.clear()
    for rows in range(60, 75):
        found = compute(kind, x[:rows], weight)
        assert torch.equal(found, expected(kind, x[:rows], weight)), rows
    assert calls.rows == [70, 74]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_which_nothing_is_left_prove_nothing(
    use: Callable[[Library], Calls], kind: str
) -> None:
    """As here those of one step of inputs, which are exact."""
    calls = use(ours)
    with rehearsal():
        for _ in range(2):
            compute(kind, aligned(ROWS, 64), aligned(400, 64))
    assert calls.rows == [ROWS]


def test_nothing_is_compared_under_capture(
    use: Callable[[Library], Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(ours)
    monkeypatch.setattr(same_bits, "capturing", lambda: True)
    with rehearsal():
        triton_invariant.linear(aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS), None)
    assert not calls.rows


def test_an_answer_holds_for_the_places_and_settings_that_it_was_given_for(
    use: Callable[[Library], Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use(ours)
    x, weight = aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS, 1)
    with rehearsal():
        triton_invariant.linear(x, weight, None)
    assert calls.rows == [ROWS] * 2
    triton_invariant.linear(x.flatten()[1:].unfold(0, INPUTS, INPUTS), weight, None)
    elsewhere = aligned(ROWS + 1, INPUTS).flatten()[8 : 8 + x.numel()].view_as(x)
    triton_invariant.linear(elsewhere, weight, None)
    triton_invariant.linear(x.t().contiguous().t(), weight, None)
    triton_invariant.linear(x.half(), weight.half(), None)
    assert calls.rows == [ROWS] * 2
    for other in (("another library",), None):
        with monkeypatch.context() as patch:
            patch.setattr(Device, "settings", other)
            triton_invariant.linear(x, weight, None)
    assert calls.rows == [ROWS] * 2
    triton_invariant.linear(x, weight, None)
    assert calls.rows == [ROWS] * 3


def test_the_log_says_who_computes(
    use: Callable[[Library], Calls], caplog: pytest.LogCaptureFixture
) -> None:
    use(lambda *given: (two_sums if len(given[0]) == 72 else ours)(*given))
    x, weight = aligned(74, INPUTS), aligned(OUTPUTS, INPUTS, 1)
    with rehearsal(), caplog.at_level("DEBUG", same_bits.__name__):
        for rows in (72, 72, 70):
            compute("plain", x[:rows], weight)
    first, second = caplog.records
    assert first.levelname == "INFO"
    assert "72 rows of a product of 320 inputs and 80 outputs: our kernel" in first.message
    assert second.levelname == "DEBUG"
    assert "70 rows of a product of 320 inputs and 80 outputs: the library" in second.message


def test_a_comparison_draws_no_random_numbers_of_the_program(
    use: Callable[[Library], Calls],
) -> None:
    use(ours)
    before = torch.random.get_rng_state()
    with rehearsal():
        triton_invariant.linear(aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS), None)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_activation_behind_a_product_is_that_of_its_kernel(device: str) -> None:
    if device != "cpu":
        pytest.skip("the conformance kit compares them on a device")
    x, weight = aligned(ROWS, INPUTS), aligned(OUTPUTS, INPUTS, 1)
    product = ours(x, weight)
    assert torch.equal(same_bits.silu_and_mul(product), ours(x, weight, gated=True))


@pytest.mark.parametrize(
    ("outputs", "inputs", "kind"),
    [
        (6144, 4096, "plain"),
        (24576, 4096, "gated"),
        (4096, 4096, "added"),
        (4096, 12288, "added"),
    ],
)
def test_a_row_is_the_same_by_the_library_and_alone_on_a_device(
    device: str, platform: Platform, outputs: int, inputs: int, kind: str
) -> None:
    """Of numbers whose products cancel, and which are not those that were compared before."""
    if device == "cpu":
        pytest.skip("a device's own library is compared")
    torch.manual_seed(outputs)
    half = torch.randn(8192, inputs // 2, device=device)
    some = torch.randn(outputs, inputs // 2, device=device)
    x = torch.cat((half, -half), dim=1).bfloat16()
    weight = torch.cat((some, some), dim=1).bfloat16()
    residual = torch.randn(8192, outputs, device=device, dtype=x.dtype) / 64

    def computed(rows: slice) -> Tensor:
        if kind != "added":
            return compute(kind, x[rows], weight)
        found = residual[rows].clone()
        triton_invariant.linear_add(x[rows], weight, None, found)
        return found

    by_library = []
    with OpTable(platform).activate(), torch.inference_mode():
        alone = torch.cat([computed(slice(begin, begin + 64)) for begin in range(0, 8192, 64)])
        for rows in (96, 128, 160, 192, 256, 320, 512, 1024, 2048, 4096, 8192):
            with rehearsal():
                found = computed(slice(rows))
            assert torch.equal(found, alone[:rows]), rows
            shape = rows, outputs, inputs
            if any(answer for key, answer in same_bits._answers.items() if key[2:5] == shape):
                by_library.append(rows)
    print(f"by the library: {by_library}")
