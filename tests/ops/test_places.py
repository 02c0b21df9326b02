"""Programs that share a tile of a product leave their sums where one of them waits for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from reprise.ops import OpTable  # noqa: E402
from reprise.ops.triton_util import give  # noqa: E402
from reprise.platforms import Platform  # noqa: E402

Launch = Callable[[Tensor], Tensor]
"""x [1, 4608] to a product that several programs share, added to something."""


@pytest.fixture
def memory(platform: Platform) -> Iterator[dict[str, Tensor]]:
    if not platform.has_triton:
        pytest.skip("there is no Triton")
    table = OpTable(platform)
    with table.activate():
        yield table.memory


INPUTS = 4608


@triton.jit
def leaving_kernel(places_ptr, values_ptr):
    number = tl.arange(0, 4)
    give(places_ptr + number, tl.load(values_ptr + number))


def some(platform: Platform, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(platform.device, dtype)


def eight_bits(platform: Platform) -> Launch:
    from reprise.ops.fp8_linear.row_kernel import launch_row

    weight = some(platform, 64, INPUTS).to(torch.float8_e4m3fn)
    scale = some(platform, 1, INPUTS // 128, dtype=torch.float32).abs()

    def launch(x: Tensor) -> Tensor:
        out = some(platform, 1, 64)
        launch_row(x, weight, scale, None, out, 64, platform.multiplies_fp8, add=True)
        return out

    return launch


def four_bits(platform: Platform) -> Launch:
    from reprise.ops.w4_linear.row_kernel import launch_row

    numbers = torch.arange(24 * INPUTS // 2, device=platform.device) * 7 % 251
    packed = numbers.to(torch.uint8).view(24, INPUTS // 2).view(torch.int32)
    scales = some(platform, 24, INPUTS // 128).abs()

    def launch(x: Tensor) -> Tensor:
        out = some(platform, 1, 24)
        launch_row(x, packed, scales, None, None, out, 128, add=True)
        return out

    return launch


PRODUCTS = {"eight bits": eight_bits, "four bits": four_bits}


@pytest.fixture(params=PRODUCTS)
def product(
    platform: Platform, memory: dict[str, Tensor], request: pytest.FixtureRequest
) -> Launch:
    return PRODUCTS[request.param](platform)


def without_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums by the last program to end, as where programs may not wait for each other."""
    for name in ("fp8_linear.row_kernel", "w4_linear.row_kernel"):
        module = importlib.import_module(f"reprise.ops.{name}")
        monkeypatch.setattr(module, "programs_wait", lambda: False)


def places_of(memory: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in memory.items() if "places" in name]


def test_who_waits_has_the_bits_of_who_is_last(platform, memory, product, monkeypatch) -> None:
    x = some(platform, 1, INPUTS)
    found = product(x)
    assert places_of(memory)
    memory.clear()
    without_places(monkeypatch)
    assert torch.equal(found, product(x))
    assert not places_of(memory)


def test_places_are_as_before_when_a_launch_ends(platform, memory, product) -> None:
    product(some(platform, 1, INPUTS))
    (places,) = places_of(memory)
    # Whole numbers, as graph verification compares memory: what is no number is unequal to itself.
    assert places.dtype is torch.int32
    assert bool((places == -1).all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_is_not_nothing(platform, memory, product) -> None:
    """Whatever bits it has: a program that took it for nothing would wait for ever."""
    x = some(platform, 1, INPUTS)
    expected, bad = product(x), x.clone()
    bad[0, 0], bad[0, -1] = float("nan"), float("inf")
    product(bad)
    assert torch.equal(product(x), expected)


def test_what_is_no_number_is_summed(platform, memory) -> None:
    x = some(platform, 1, INPUTS)
    x[0, 0] = float("nan")
    assert bool(four_bits(platform)(x).isnan().all())


def test_no_number_that_is_left_is_nothing(platform, memory) -> None:
    """What is no number may have all bits ones, too."""
    values = torch.tensor([-1, 0x7FFFFFFF, 0, 0x3F800000], dtype=torch.int32)
    places = torch.full_like(values, -1, device=platform.device)
    leaving_kernel[(1,)](places, values.to(platform.device).view(torch.float32))
    assert not bool((places == -1).any())
    assert places.view(torch.float32)[2:].tolist() == [0.0, 1.0]
